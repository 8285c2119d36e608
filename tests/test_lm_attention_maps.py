"""Attention maps: the weights against a computation of their own, the PNG, and the page in a real browser."""

import shutil

import pytest
import torch

from pykern.cli import main
from pykern.lm import Config, Tokenizer, Transformer
from pykern.lm.attention_maps import attention_maps, plot_attention, shown
from pykern.lm.attention_page import attention_page
from pykern.lm.checkpoint import save_checkpoint

POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "t5", "none")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def make_model(positions="rope", **shape):
    torch.manual_seed(0)
    base = {"vocab_size": 256, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "block_size": 32}
    model = Transformer(Config(positions=positions, **base | shape))
    for p in model.parameters():  # scores that are far from even
        torch.nn.init.normal_(p, 0.0, 0.4)
    return model


@pytest.mark.parametrize("positions", POSITIONS)
def test_maps_are_the_softmax_of_the_scores_in_float64(positions):
    model, ids = make_model(positions), torch.tensor([5, 3, 3, 200, 17, 5, 0])
    maps = attention_maps(model, ids)
    T = len(ids)
    assert maps.shape == (2, 4, T, T) and maps.dtype == torch.float32
    assert torch.equal(maps.triu(1), torch.zeros_like(maps))
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, T), rtol=0, atol=2e-6)
    twin = make_model(positions).double()
    x = twin.embed(ids[None], 0)
    place = twin.position_arguments(0, T, x)
    from pykern import ops

    for layer, block in enumerate(twin.transformer.h):
        q, k, _ = block.attn.heads(block.ln_1(x))
        if "rotary" in place:
            q, k = (ops.rope(y, *place["rotary"]) for y in (q, k))
        scores = q @ k.repeat_interleave(2, 1).mT / k.shape[-1] ** 0.5
        if "bias" in place:
            scores = scores + place["bias"]
        if "alibi_slopes" in place:
            distance = torch.arange(T)[:, None] - torch.arange(T)
            scores = scores - place["alibi_slopes"].double().view(1, -1, 1, 1) * distance
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        torch.testing.assert_close(maps[layer].double(), scores.softmax(-1)[0], rtol=0, atol=2e-4)
        x = block(x, **place)


def test_dropout_is_off_and_the_mode_kept():
    model = make_model(dropout=0.5).train()
    assert torch.equal(attention_maps(model, [1, 2, 3]), attention_maps(model, [1, 2, 3])) and model.training


def test_refusals():
    model = make_model()
    with pytest.raises(TypeError, match="model must be a Transformer, got int"):
        attention_maps(3, [1])
    for ids in ([], [[1, 2]], [1] * 33):
        with pytest.raises(ValueError, match=r"must be \[T\] with T from 1 to 32"):
            attention_maps(model, ids)
    for ids in ([256], [-1]):
        with pytest.raises(IndexError, match="from 0 to 255"):
            attention_maps(model, ids)
    maps = attention_maps(model, [1, 2])
    with pytest.raises(ValueError, match="for 3 tokens"):
        attention_page(maps, ["a", "b", "c"])
    with pytest.raises(ValueError, match="weights from 0 to 1"):
        attention_page(maps * 2, ["a", "b"])
    with pytest.raises(IndexError, match="head is 4, but the model has 4"):
        plot_attention(maps, ["a", "b"], "never.png", head=4)


def test_shown():
    assert [shown(t) for t in (" a", "\n", "", "\x00", "abcdefghijklmnop")] == ["␣a", "⏎", "∅", "�", "abcdefghijk…"]


def test_the_picture_has_a_square_per_head(tmp_path):
    from matplotlib.image import imread

    maps = attention_maps(make_model(), [1, 2, 3])
    plot_attention(maps, ["a", "b", "c"], tmp_path / "all.png")
    plot_attention(maps, ["a", "b", "c"], tmp_path / "one.png", layer=1, head=2)
    everything, one = (imread(tmp_path / name) for name in ("all.png", "one.png"))
    assert everything.shape[1] > 1.5 * everything.shape[0] > 0 and abs(one.shape[0] - one.shape[1]) < 100
    for picture in (everything, one):  # the darkest blue of the map: a first row looks at itself alone
        assert (abs(picture[..., :3] - [8 / 255, 48 / 255, 107 / 255]).max(-1) < 0.02).sum() > 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = make_model()
    save_checkpoint(folder, config=model.config, tensors=model.state_dict(), tokenizer=Tokenizer.train("byte"))
    return folder


def test_command(folder, tmp_path, capsys):
    out = tmp_path / "maps.png"
    assert main(["attention", "--model", str(folder), "--prompt", "hello", "--out", str(out)]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG" and "2 layers, 4 heads, 5 tokens" in capsys.readouterr().out
    for rest, words in (
        (["--prompt", "a", "--out", "maps.gif"], "must end in .png or .html"),
        (["--prompt", "a", "--out", "maps.html", "--head", "1"], "belong to a .png"),
        (["--prompt", "", "--out", str(out)], "T from 1 to 32"),
        (["--prompt", "a", "--out", str(out), "--layer", "-1"], "layer is -1"),
    ):
        assert main(["attention", "--model", str(folder), *rest]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page is not looked at in a browser")
def test_the_page_in_a_browser(folder, tmp_path, capsys):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    prompt = "if a</script><b>:\n\tx & y"
    out = tmp_path / "maps.html"
    assert main(["attention", "--model", str(folder), "--prompt", prompt, "--out", str(out)]) == 0
    maps = attention_maps(Transformer.load(folder), list(prompt.encode()))
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        errors, requests = [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(out.as_uri())
        assert page.locator("#heads button").count() == 8 and page.locator("#text span").count() == len(prompt)
        written = prompt.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
        assert page.locator("#text").inner_text().replace("\n", "") == written
        page.get_by_label("layer 1, head 2").click()
        page.locator("#text span").nth(9).hover()
        best = int(maps[1, 2, 9].argmax())
        weight = round(float(maps[1, 2, 9, best]) * 255) / 255
        reading = page.locator("#reading").inner_text()
        assert 'layer 1, head 2: token 9 "' in reading
        assert page.locator("#reading tr").first.inner_text().split("\t")[1:3] == [
            f"at {best}",
            f"{100 * weight:.1f} %",
        ]
        assert "query" in page.locator("#text span").nth(9).get_attribute("class")
        box = page.locator("#map").bounding_box()  # a cell of row 4, column 1
        cell = box["width"] / len(prompt)
        page.mouse.move(box["x"] + 1.5 * cell, box["y"] + 4.5 * cell)
        assert "token 4 " in page.locator("#reading").inner_text()
        assert "at 1" in page.locator("#reading tr").first.inner_text()
        drawn = page.evaluate(
            "() => { const c = document.getElementById('map');"
            "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 60; return [c.width, n]; }"
        )
        assert drawn[0] == len(prompt) and drawn[1] >= len(prompt)
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert errors == [] and [url for url in requests if not url.startswith("file:")] == []
