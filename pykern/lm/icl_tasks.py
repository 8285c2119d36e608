"""Synthetic mapping tasks: a hidden random function from a few keys to labels, k examples of it, and a key to label.

    "\\n" x1 y1 x2 y2 … xk yk x   →   y        each symbol one character, y = f(x), keys and f drawn anew for each task

Labels are drawn independently for every key, so a label can be known only by having been shown: all that a predictor
can do is to find the example with the same key, and to guess when there is none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pykern.lm.tokenizer import Tokenizer

START = "\n"
IGNORED = -100  # the target of a position that the loss leaves out
TRAINING, EVALUATION = 0, 1  # random streams that never meet, whatever the seed


@dataclass(frozen=True)
class Episodes:
    """prompts [E, 2 k + 2] int64: symbols of START, k examples, and the key asked for; answers [E]: its label's number.

    The answers are nowhere in the prompts but in examples with the same key.
    """

    prompts: np.ndarray
    answers: np.ndarray

    @property
    def shots(self) -> int:
        return self.prompts.shape[1] // 2 - 1

    @property
    def examples(self) -> np.ndarray:
        """[E, k, 2] int64: the symbols of key and label of every example."""
        return self.prompts[:, 1:-1].reshape(len(self.prompts), self.shots, 2)


def stream(*numbers: int) -> np.random.Generator:
    """A random stream that follows from the numbers alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def check_whole(function: str, name: str, value: object, least: int, most: int = 2**31 - 1) -> None:
    """TypeError unless value is an integer, ValueError unless it lies from least to most; both name the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{function}: {name} must be an integer, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{function}: {name} is {value} but must be from {least} to {most}")


@dataclass(frozen=True)
class MappingTasks:
    """The functions from `used` of the `keys` to `labels`, each key and label one character.

    A task is a uniform choice of `used` keys and of a function of them. A symbol is a number: 0 is START, then the
    keys, then the labels, in the order of `alphabet`. ValueError unless all characters are different.
    """

    keys: str = "abcdefgh"
    labels: str = "0123"
    used: int = 4

    def __post_init__(self) -> None:
        for name, least in (("keys", 1), ("labels", 2)):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"MappingTasks: {name} must be str, got {type(value).__name__}")
            if len(value) < least:
                raise ValueError(f"MappingTasks: {name} is {value!r} but must have at least {least} characters")
        if len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError(
                f"MappingTasks: keys {self.keys!r} and labels {self.labels!r} must be different characters, "
                "none of them a new line"
            )
        check_whole("MappingTasks", "used", self.used, 1, len(self.keys))

    @property
    def alphabet(self) -> str:
        return START + self.keys + self.labels

    @property
    def count(self) -> int:
        """How many different tasks there are."""
        return math.comb(len(self.keys), self.used) * len(self.labels) ** self.used

    @property
    def first_label(self) -> int:
        """The symbol of label number 0; the others follow."""
        return 1 + len(self.keys)

    @property
    def chance(self) -> Fraction:
        """The accuracy of any guess that has seen no example: 1 / number of labels."""
        return Fraction(1, len(self.labels))

    def optimal_accuracy(self, shots: int) -> Fraction:
        """The accuracy of the best possible predictor of sample(shots), exactly: s + (1 - s) / L.

        s = min(k, used) / used is the probability that one of the k examples shows the key asked for. ValueError for
        negative shots.
        """
        check_whole("optimal_accuracy", "shots", shots, 0)
        shown = Fraction(min(int(shots), self.used), self.used)
        return shown + (1 - shown) * self.chance

    def sample(self, shots: int, episodes: int, seed: int = 0) -> Episodes:
        """Episodes of `shots` examples each, every one with a task of its own; same arguments, same episodes.

        Examples show different keys in random order; after all of the task's keys have been shown, a new round begins.
        The key asked for is uniform among the task's keys, shown or not.
        """
        check_whole("sample", "shots", shots, 0, 1 << 16)
        check_whole("sample", "episodes", episodes, 1)
        check_whole("sample", "seed", seed, 0, 2**63 - 1)
        random = stream(EVALUATION, seed, shots)
        keys = self._keys(random, episodes)
        functions = random.integers(len(self.labels), size=keys.shape)
        rounds = np.tile(np.arange(self.used), (episodes, -(-shots // self.used), 1))
        shown = random.permuted(rounds, axis=2).reshape(episodes, -1)[:, :shots]
        asked = random.integers(self.used, size=(episodes, 1))
        prompts = np.zeros((episodes, 2 * shots + 2), np.int64)
        prompts[:, 1:-1:2] = np.take_along_axis(keys, shown, 1)
        prompts[:, 2::2] = self.first_label + np.take_along_axis(functions, shown, 1)
        prompts[:, -1:] = np.take_along_axis(keys, asked, 1)
        return Episodes(prompts, np.take_along_axis(functions, asked, 1)[:, 0])

    def _keys(self, random: np.random.Generator, tasks: int) -> np.ndarray:
        """The symbols of the keys of each task, in random order, int64 [tasks, used]."""
        every = np.tile(np.arange(1, 1 + len(self.keys)), (tasks, 1))
        return random.permuted(every, axis=1)[:, : self.used]

    def training_rows(self, examples: int, rows: int, *, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(symbols, targets), both [rows, 2 examples] int64: START x1 y1 … xn, and at each key its label.

        Every row is one task, and every example in it a query after the examples before it, so one row trains all
        numbers of shots. Examples are drawn with replacement. The other targets are IGNORED. The batch is a function
        of (seed, step).
        """
        random = stream(TRAINING, seed, step)
        keys = self._keys(random, rows)
        functions = random.integers(len(self.labels), size=keys.shape)
        shown = random.integers(self.used, size=(rows, examples))
        labels = self.first_label + np.take_along_axis(functions, shown, 1)
        symbols = np.zeros((rows, 2 * examples), np.int64)
        symbols[:, 1::2] = np.take_along_axis(keys, shown, 1)
        symbols[:, 2::2] = labels[:, :-1]
        targets = np.full_like(symbols, IGNORED)
        targets[:, 1::2] = labels
        return symbols, targets

    def text(self, symbols: Sequence[int] | np.ndarray) -> str:
        """The characters of symbols [T]."""
        return "".join(self.alphabet[int(symbol)] for symbol in symbols)

    def token_ids(self, tokenizer: "Tokenizer") -> np.ndarray:
        """The token of each symbol, int64 [1 + K + L]; ValueError when the tokenizer has no token for one of them."""
        ids = []
        for character in self.alphabet:
            tokens = tokenizer.encode(character)
            if len(tokens) != 1 or tokenizer.decode(tokens) != character:
                raise ValueError(f"token_ids: the tokenizer has no token for {character!r}, which the tasks need")
            ids.append(tokens[0])
        return np.array(ids, np.int64)
