"""Padded and packed texts: each gets the logits, loss and gradients that it gets alone; batches of texts."""

import numpy as np
import pytest
import torch
from lm_models import POSITIONS, make, random_ids

from pykern import nn
from pykern.lm import Tokenizer
from pykern.lm.compare_batching import compare
from pykern.lm.config import Config
from pykern.lm.corpus import parts
from pykern.lm.documents import Documents, PackedBatches, PaddedBatches, pack, shuffled
from pykern.lm.layout import make_layout
from pykern.lm.options import TrainOptions

LENGTHS = (70, 1, 33, 80, 5)  # attention works in tiles of 64 keys: texts that cross them and texts that do not
SHAPE = {"n_kv_head": 2, "block_size": 80, "tied_head": False}


def texts_of(lengths=LENGTHS):
    return [random_ids(n, seed=n) for n in lengths]


def padded(texts, pad=0, width=None):
    lengths = torch.tensor([len(t) for t in texts])
    ids = torch.full((len(texts), width or int(lengths.max())), pad)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    return ids, lengths


def packed(texts, rows, width):
    """ids, documents, lengths [B, width]: rows lists indices of texts; the rest of a row is padding."""
    ids, documents = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        joined = torch.cat([texts[i] for i in row])
        ids[b, : len(joined)] = joined
        documents[b, : len(joined)] = torch.repeat_interleave(
            torch.tensor(row), torch.tensor([len(texts[i]) for i in row])
        )
    lengths = torch.tensor([sum(len(texts[i]) for i in row) for row in rows])
    return ids, documents, lengths


ROWS, WIDTH = [[0, 1, 2], [3, 4]], 110


# ---- a text among others is the text alone


@pytest.mark.parametrize("kind", POSITIONS)
def test_padded_texts_have_the_logits_they_have_alone(kind):
    """Bit for bit, whatever the padding."""
    model, texts = make(positions=kind, **SHAPE), texts_of()
    with torch.no_grad():
        alone = [model(t[None])[0] for t in texts]
        for pad in (0, 7):
            ids, lengths = padded(texts, pad)
            out = model(ids, lengths=lengths)
            assert out.shape == (*ids.shape, 11) and out.isfinite().all()
            for row, text, expected in zip(out, texts, alone, strict=True):
                assert torch.equal(row[: len(text)], expected)


@pytest.mark.parametrize("kind", POSITIONS)
def test_packed_texts_have_the_logits_they_have_alone(kind):
    """Bit for bit; with t5, which has a mask and not offsets, to rounding: its keys then lie in other tiles."""
    model, texts = make(positions=kind, **SHAPE), texts_of()
    ids, documents, lengths = packed(texts, ROWS, WIDTH)
    with torch.no_grad():
        out = model(ids, documents=documents, lengths=lengths)
        for b, row in enumerate(ROWS):
            start = 0
            for i in row:
                expected = model(texts[i][None])[0]
                got = out[b, start : start + len(texts[i])]
                start += len(texts[i])
                if kind == "t5" and i != row[0]:
                    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
                else:
                    assert torch.equal(got, expected), (kind, i)


@pytest.mark.parametrize("kind", POSITIONS)
def test_attention_gets_offsets_but_for_t5(kind, monkeypatch):
    seen = []
    forward = nn.SelfAttention.forward
    monkeypatch.setattr(
        nn.SelfAttention, "forward", lambda self, x, *a, **k: seen.append((x.shape, k)) or forward(self, x, *a, **k)
    )
    ids, documents, lengths = packed(texts_of(), ROWS, WIDTH)
    make(positions=kind, **SHAPE)(ids, documents=documents, lengths=lengths)
    shape, arguments = seen[0]
    if kind == "t5":
        assert (
            shape[:2] == (2, WIDTH) and arguments["cu_seqlens"] is None and arguments["mask"].shape == (2, 1, 110, 110)
        )
        assert arguments["mask"][0, 0, 71, :73].tolist() == [False] * 71 + [True] * 2
    else:
        assert shape[:2] == (1, 2 * WIDTH) and arguments["mask"] is None
        assert arguments["cu_seqlens"].tolist() == [0, 70, 71, 104, 110, 190, 195, 220]
    padded_ids, padded_lengths = padded(texts_of())
    make(positions=kind, **SHAPE)(padded_ids, lengths=padded_lengths)
    assert seen[-1][1]["mask"].shape == (5, 1, 1, 80) and seen[-1][1]["cu_seqlens"] is None


@pytest.mark.parametrize("kind", POSITIONS)
def test_gradients_are_the_sum_of_those_alone(kind):
    """Of every parameter, the t5 bias and the learned positions included; float64."""
    lengths = (9, 2, 6)
    model = make(positions=kind, dtype=torch.float64)
    texts = texts_of(lengths)

    def gradients(call):
        model.zero_grad(set_to_none=True)
        loss = call()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    def alone():
        return sum(model(t[None, :-1], t[None, 1:], reduction="sum") for t in texts)

    x, lens = padded([t[:-1] for t in texts], pad=3)
    y, _ = padded([t[1:] for t in texts], pad=4)  # the loss leaves the padding out by itself
    cut = [t[:-1] for t in texts]
    ids, documents, row_lengths = packed(cut, [[0, 1], [2]], 12)
    targets = packed([t[1:] for t in texts], [[0, 1], [2]], 12)[0]
    expected = gradients(alone)
    for got in (
        gradients(lambda: model(x, y, lengths=lens, reduction="sum")),
        gradients(lambda: model(ids, targets, documents=documents, lengths=row_lengths, reduction="sum")),
    ):
        assert got[0] == pytest.approx(expected[0], rel=1e-12)
        for name, gradient in expected[1].items():
            torch.testing.assert_close(got[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", POSITIONS)
def test_padding_is_inert(kind):
    """NaN embeddings at padded ids reach no logits, loss or gradient."""
    model, texts = make(positions=kind, tied_head=False, block_size=24), [t % 10 for t in texts_of((9, 4, 12))]
    ids, lengths = padded(texts, pad=10, width=14)
    targets = ids.roll(-1, 1)

    def results():
        model.zero_grad(set_to_none=True)
        loss = model(ids, targets, lengths=lengths)
        loss.backward()
        real = torch.arange(14) < lengths[:, None]
        with torch.no_grad():
            logits = model(ids, lengths=lengths)[real]
        return loss.detach(), logits, {name: p.grad.clone() for name, p in model.named_parameters()}

    loss, logits, gradients = results()
    with torch.no_grad():
        model.transformer.wte.weight[10] = torch.nan
        if kind == "learned":
            model.transformer.wpe.weight[12:] = torch.nan
    loss_nan, logits_nan, gradients_nan = results()
    assert loss.isfinite() and torch.equal(loss, loss_nan) and torch.equal(logits, logits_nan)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() and torch.equal(gradient, gradients_nan[name]), name
    documents = torch.zeros_like(ids)
    with torch.no_grad():
        both = model(ids, documents=documents, lengths=lengths)[torch.arange(14) < lengths[:, None]]
    assert torch.equal(both, logits)


def test_a_text_does_not_see_nan_of_another():
    for kind in POSITIONS:
        model = make(positions=kind, tied_head=False)
        ids = torch.tensor([[1, 2, 10, 3, 4, 5]])
        documents = torch.tensor([[0, 0, 1, 2, 2, 2]])
        with torch.no_grad():
            clean = model(ids, documents=documents)
            model.transformer.wte.weight[10] = torch.nan
            dirty = model(ids, documents=documents)
        kept = [0, 1, 3, 4, 5]
        assert dirty[0, 2].isnan().all() and torch.equal(dirty[0, kept], clean[0, kept]), kind


def test_rows_may_be_longer_than_the_block():
    model = make(positions="rope", block_size=10)
    texts = texts_of((9, 10, 7, 10))
    ids, documents, lengths = packed(texts, [[0, 1, 2, 3]], 36)
    with torch.no_grad():
        out = model(ids, documents=documents, lengths=lengths)[0].split([9, 10, 7, 10])
        assert all(torch.equal(a, model(t[None])[0]) for a, t in zip(out, texts, strict=True))
    with pytest.raises(ValueError, match="11 tokens of one text exceed block_size 10"):
        model(random_ids(1, 11), documents=torch.zeros(1, 11, dtype=torch.int64))


def test_recompute_and_dropout_in_training():
    model = make(positions="rope", norm="rmsnorm", dropout=0.5).train()
    ids, documents, lengths = packed(texts_of((5, 6, 7)), [[0, 1], [2]], 12)

    def gradient():
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        model(ids, ids, documents=documents, lengths=lengths).backward()
        return model.transformer.wte.weight.grad.clone()

    plain = gradient()
    assert torch.equal(plain, gradient()) and plain.isfinite().all()
    model.recompute()
    assert torch.equal(plain, gradient())


def test_nothing_to_lay_out():
    model = make(positions="learned")
    for shape in ((0, 5), (3, 0)):
        ids = torch.zeros(shape, dtype=torch.int64)
        lengths = torch.zeros(shape[0], dtype=torch.int64)
        assert model(ids, lengths=lengths, documents=ids).shape == (*shape, 11)
    ids, lengths = padded([*texts_of((4,)), random_ids(0)])
    with torch.no_grad():
        out = model(ids, lengths=lengths)
        assert torch.equal(out[0], model(ids[:1])[0]) and out.isfinite().all()


IDS = torch.zeros(2, 3, dtype=torch.int64)
BAD_LAYOUTS = {
    "lengths is a list": (dict(lengths=[3, 3]), TypeError, "lengths must be a tensor, got list"),
    "int32 lengths": (dict(lengths=torch.tensor([3, 3], dtype=torch.int32)), TypeError, "lengths must be int64"),
    "lengths of three": (dict(lengths=torch.tensor([3, 3, 3])), ValueError, r"lengths has shape \(3,\)"),
    "too long": (dict(lengths=torch.tensor([3, 4])), ValueError, r"lengths reach from 3 to 4, not 0\.\.3"),
    "negative": (dict(lengths=torch.tensor([-1, 3])), ValueError, "lengths reach from -1 to 3"),
    "bool documents": (dict(documents=IDS.bool()), TypeError, "documents must be int64, got torch.bool"),
    "documents of a row": (dict(documents=IDS[0]), ValueError, r"documents has shape \(3,\) but must be \(2, 3\)"),
    "decreasing": (
        dict(documents=torch.tensor([[0, 0, 0], [1, 2, 1]])),
        ValueError,
        "must not decrease along a row, but row 1 has 2 and then 1 at position 2",
    ),
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_bad_layouts(case):
    arguments, error, words = BAD_LAYOUTS[case]
    with pytest.raises(error, match=words):
        make()(IDS, **arguments)


def test_layouts_and_caches_exclude_each_other():
    model = make()
    session = model.session()
    with pytest.raises(ValueError, match="cannot be combined with a cache"):
        model.hidden(IDS[:1], session.cache, lengths=torch.tensor([3]))
    layer = nn.SelfAttention(8, 2)
    with pytest.raises(ValueError, match=r"cu_seqlens needs x \[1, T, width\] and no cache, got x \[2, 3, 8\]"):
        layer(torch.zeros(2, 3, 8), cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))


def test_layout_of_documents():
    documents = torch.tensor([[4, 4, 9, 9, 0], [1, 1, 1, 1, 1]])  # what is in the padding does not matter
    layout = make_layout(documents, torch.tensor([4, 5]), documents, offsets=True)
    assert layout.positions.tolist() == [[0, 1, 0, 1, 0], [0, 1, 2, 3, 4]]
    assert layout.cu_seqlens.tolist() == [0, 2, 4, 5, 10] and layout.cu_seqlens.dtype == torch.int32
    mask = make_layout(documents, torch.tensor([4, 5]), documents, offsets=False).mask
    assert mask.shape == (2, 1, 5, 5) and mask[0, 0].sum() == 2 * 4 + 1 and mask[1].all()


# ---- batches


def documents_of(lengths, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 200, sum(lengths)).astype(np.uint16)
    return Documents(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def rows_of(batch):
    """The texts of a batch as (inputs, targets), in order."""
    found = []
    for b, n in enumerate(batch.lengths.tolist()):
        numbers = batch.documents[b, :n] if batch.documents is not None else torch.zeros(n, dtype=torch.int64)
        for number in numbers.unique().tolist():
            at = torch.nonzero(numbers == number).flatten()
            found.append((tuple(batch.ids[b, at].tolist()), tuple(batch.targets[b, at].tolist())))
    return found


@pytest.mark.parametrize("kind", [PaddedBatches, PackedBatches])
def test_an_epoch_holds_every_text_once(kind):
    lengths = [5, 1, 12, 3, 0, 30, 2, 9, 9, 4]
    texts = documents_of(lengths)
    batches = kind(texts, block_size=10, batch_size=1, seed=3, pad_id=0)
    found = [pair for step in range(batches.rows_per_epoch) for pair in rows_of(batches.at(step))]
    expected = []
    for i, n in enumerate(lengths):
        if n >= 2:  # one token has nothing to predict; block_size + 1 tokens give block_size inputs
            text = texts[i][:11].tolist()
            expected.append((tuple(text[:-1]), tuple(text[1:])))
    assert sorted(found) == sorted(expected)
    again = [
        pair for step in range(batches.rows_per_epoch, 2 * batches.rows_per_epoch) for pair in rows_of(batches.at(step))
    ]
    assert sorted(again) == sorted(expected) and again != found


def test_padding_of_batches():
    texts = documents_of([3, 6, 2, 12])
    batches = PaddedBatches(texts, block_size=8, batch_size=2, seed=1, pad_id=199)
    for step in range(4):
        batch = batches.at(step)
        assert batch.documents is None and batch.ids.shape == (2, int(batch.lengths.max()))
        padding = torch.arange(batch.ids.shape[1]) >= batch.lengths[:, None]
        assert (batch.ids[padding] == 199).all() and (batch.targets[padding] == -100).all()
        assert (batch.targets[~padding] != -100).all() and batch.tokens == int((~padding).sum())
    packed_batch = PackedBatches(texts, block_size=12, batch_size=1, seed=1, pad_id=7).at(0)
    n = int(packed_batch.lengths)
    assert packed_batch.ids.shape == (1, 12) and (packed_batch.ids[0, n:] == 7).all()
    assert (packed_batch.targets[0, n:] == -100).all() and (packed_batch.documents.diff() >= 0).all()


@pytest.mark.parametrize("kind", [PaddedBatches, PackedBatches])
def test_a_batch_follows_from_seed_and_step(kind):
    texts = documents_of(np.random.default_rng(1).integers(2, 20, 50).tolist())

    def same(a, b):
        return torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets) and torch.equal(a.lengths, b.lengths)

    first = kind(texts, 16, 4, seed=5)
    steps = [first.at(step) for step in range(30)]  # several epochs
    resumed = kind(texts, 16, 4, seed=5)
    for step in (29, 7, 8, 0, 29):
        assert same(resumed.at(step), steps[step])
    assert not same(kind(texts, 16, 4, seed=6).at(0), steps[0])


def test_shuffle_is_pinned():
    assert shuffled(3, 1, 8).tolist() == PINNED
    texts = documents_of([4, 7, 3, 5])
    assert PaddedBatches(texts, 8, 4, seed=3).at(0).lengths.tolist() == [
        len(texts[int(i)]) - 1 for i in shuffled(3, 0, 4)
    ]


PINNED = [5, 6, 3, 7, 0, 1, 2, 4]


def test_pack_fits_best():
    lengths = np.array([6, 3, 10, 4, 1, 7, 2, 1])
    rows = pack(lengths, 10, np.arange(8))
    # 4 does not fit beside 6 and 3 and opens a row; 1 joins the fullest; 7 opens a row, which 2 and 1 join
    assert [[int(lengths[i]) for i in row] for row in rows] == [[6, 3, 1], [10], [4], [7, 2, 1]]
    assert pack(lengths, 10, np.array([2, 0, 3, 5, 1, 6, 4, 7])) == [[2], [0, 3], [5, 1], [6, 4, 7]]
    rng = np.random.default_rng(0)
    many = rng.integers(1, 33, 2000)  # up to half a row, so that rows can be filled
    rows = pack(many, 64, rng.permutation(2000))
    assert sorted(i for row in rows for i in row) == list(range(2000))
    assert max(many[row].sum() for row in rows) <= 64 and many.sum() / (64 * len(rows)) > 0.97
    assert pack(np.zeros(0, np.int64), 5, np.zeros(0, np.int64)) == []


@pytest.mark.parametrize("kind", POSITIONS)
def test_padded_and_packed_epochs_have_one_loss(kind):
    texts = documents_of([5, 9, 3, 12, 2, 7])
    model = make(positions=kind, vocab_size=200, dtype=torch.float64)
    losses = []
    for batches in (PaddedBatches(texts, 12, 1, seed=0), PackedBatches(texts, 12, 1, seed=0)):
        with torch.no_grad():
            losses.append(sum(float(batches.at(step).loss(model, "sum")) for step in range(batches.rows_per_epoch)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((["a"], 8, 2), TypeError, "texts must be Documents, got list"),
        ((documents_of([1, 0]), 8, 2), ValueError, "none of the 2 texts has 2 tokens or more"),
        ((documents_of([5]), 0, 2), ValueError, "block_size must be at least 1, got 0"),
        ((documents_of([5]), 8, True), TypeError, "batch_size must be an integer, got bool"),
        ((documents_of([5]), 8, 2, -1), ValueError, "seed must be at least 0, got -1"),
        ((documents_of([5]), 8, 2, 0, 1.5), TypeError, "pad_id must be an integer, got float"),
    ],
)
def test_batches_refuse(arguments, error, words):
    for kind in (PaddedBatches, PackedBatches):
        with pytest.raises(error, match=f"{kind.__name__}: {words}"):
            kind(*arguments)
    with pytest.raises(ValueError, match="PaddedBatches: step must be at least 0, got -1"):
        PaddedBatches(documents_of([5]), 8, 2).at(-1)


def test_compare_trains_both_ways_on_the_same_texts():
    words = parts(("one two\nthree\n\n\nfour five six seven\n" * 20,), "lines")
    assert words[:3] == ["one two\n", "three\n", "four five six seven\n"]
    assert parts(("a\nb\n\nc",), "paragraphs") == ["a\nb\n\n", "c"]
    texts = Documents.encode(words, Tokenizer.train("byte"))
    config = Config(n_layer=1, n_head=2, n_embd=16, block_size=24, vocab_size=256)
    ways = compare(texts, texts, config, TrainOptions(steps=12, lr=1e-2, warmup=2), targets=200)
    assert [way.name for way in ways] == ["padded", "packed"]
    assert ways[0].padding > 0.3 and ways[1].padding < 0.1
    for way in ways:
        assert way.tokens == pytest.approx(12 * 200, rel=0.1) and way.tokens_per_second > 0 and way.loss < 5.0
    assert ways[0].loss == pytest.approx(ways[1].loss, abs=0.2)
