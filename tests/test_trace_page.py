"""`trace.html` and what `mustdrop explain` writes: the page says what the trace says, and works in a real browser."""

from __future__ import annotations

import json
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

import mustdrop
from mustdrop import PrefillPruner, VisionStagePruner, trace_page
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError
from mustdrop.trace_page import MethodRun
from mustdrop.trace_view import coverage, rows_of
from support import browser
from support.builders import IMAGE, LLAMA, answer, batch, clone
from support.masking_check import patched
from test_cli import call
from test_trace_drawing import family
from tests.families import fixture_of

BOTH = {
    "vision": VisionStagePruner(window=3, threshold=0.0, key_share=0),
    "prefill": PrefillPruner(layers=(1, 2), survivors=(0.7, 0.4)),
}
RED = (200, 30, 30)


def picture(size=(48, 36), colour=RED):
    return Image.new("RGB", size, colour)


def made(name, kind, pictures, given):
    return family(name, kind, pictures, **BOTH), given


def one_image():
    model, inputs = patched(LLAMA, **BOTH), batch(LLAMA, (1,))
    answer(model, inputs, steps=1)
    return mustdrop.trace(model), picture()


def several_images():
    model, inputs = patched(LLAMA, **BOTH), batch(LLAMA, (3,))
    answer(model, inputs, steps=1)
    return mustdrop.trace(model), [picture(), picture((20, 60)), picture((60, 20))]


def tiles():
    size = fixture_of(registry()["llava_next"]).sizes("image")[0]
    return made("llava_next", "image", [torch.randn(size)], picture((size[-1] * 4, size[-2] * 4)))


def wide():
    return made("qwen2_5_vl", "image", [torch.randn(3, 24, 120)], picture((160, 32)))


def tall():
    return made("qwen3_vl", "image", [torch.randn(3, 72, 24)], picture((32, 96)))


def video():
    size = fixture_of(registry()["video_llava"]).sizes("video")[0]
    return made("video_llava", "video", [torch.randn(size)], [picture(colour=(30 * i, 90, 90)) for i in range(size[0])])


def packed_video():
    return made("qwen2_5_vl", "video", [torch.randn(4, 3, 32, 48)], [picture((48, 32)) for _ in range(4)])


SCENES = [one_image, several_images, tiles, wide, tall, video, packed_video]


# -- what the page knows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["eager", "sdpa"])
def test_the_attention_of_a_trace_is_that_of_the_model(variant):
    model, inputs = clone(LLAMA), batch(LLAMA, (1, 2))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation(variant)
    mustdrop.patch(model, prefill=PrefillPruner(layers=(1, 2), keep=0.5))
    with torch.no_grad():
        model(**inputs)
    trace = mustdrop.last_trace(model)
    for b in range(2):
        vision = inputs["input_ids"][b] == IMAGE
        last = int(vision.nonzero().max())
        expected = whole[1][b].mean(0)[last + 1 :].sum(0)[vision]  # the words after the last picture
        found = trace.attention(b)
        assert list(found) == list(trace.filters)
        torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=0)
        gone = torch.ones(len(expected), dtype=torch.bool)
        gone[trace.kept(2, b)] = False
        assert torch.equal(found[2].isnan(), gone)
        copied = pickle.loads(pickle.dumps(trace)).attention(b)
        assert all(torch.equal(copied[layer].nan_to_num(), found[layer].nan_to_num()) for layer in found)


@pytest.mark.parametrize("method", ["none", "uniform"])
def test_where_nothing_is_read_there_is_no_attention(method):
    model, inputs = clone(LLAMA), batch(LLAMA, (1,))
    mustdrop.patch(model, method)
    answer(model, inputs, steps=1)
    assert mustdrop.last_trace(model).attention() == {}


def test_facts_are_those_of_the_trace():
    trace, given = one_image()
    facts = trace_page.facts(given, [MethodRun(trace)])
    (method,), (row,) = facts["methods"], facts["rows"]
    assert method["tokens"] == trace.tokens[:, 0].tolist()
    for layer in range(len(trace.tokens) + 1):
        assert method["alive"][method["at"][layer]] == trace.kept(layer).tolist()
    merged = coverage(trace, 0, 0)[:-1] == 0.5
    assert merged.any()
    owner = torch.tensor(method["owner"])
    assert torch.equal((owner >= 0) & (owner != torch.arange(len(owner))), merged)
    assert sorted(row["tokens"]) == list(range(int(trace.total[0])))
    assert [heat["name"] for heat in method["heat"]][-len(trace.filters) :] == [
        f"attention of the words in layer {layer}" for layer in trace.filters
    ]


def test_the_page_is_one_file_without_addresses_and_text_stays_text(tmp_path):
    trace, given = one_image()
    nasty = "</script><script>alert(1)</script> & <b>"
    path = trace.html(tmp_path / "sub" / "kept.html", given, question=nasty, answer=nasty)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert "http://" not in text
    assert "https://" not in text
    assert "<script>alert" not in text
    (inner,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', text, re.DOTALL)
    assert json.loads(inner)["question"] == nasty


def test_what_cannot_be_shown_is_refused(tmp_path):
    trace, given = one_image()
    other, _ = tall()
    with pytest.raises(ConfigError, match="is a folder"):
        trace.html(tmp_path, given)
    with pytest.raises(ConfigError, match="at least one"):
        trace_page.write(tmp_path / "x.html", given, [])
    with pytest.raises(ConfigError, match="not of the same prompt"):
        trace_page.write(tmp_path / "x.html", given, [MethodRun(trace), MethodRun(other)])
    with pytest.raises(ConfigError, match="1 image"):
        trace.html(tmp_path / "x.html", [given, given])
    with pytest.raises(ConfigError, match="batch rows"):
        trace.html(tmp_path / "x.html", given, sample=3)
    assert not (tmp_path / "x.html").exists()


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if browser.missing():
        pytest.skip(browser.missing())
    driver = browser.start(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def opened(driver, tmp_path):
    """Opens a page of these calls, or a written one; its console must stay silent, and nothing come from elsewhere."""

    def show(given, *runs, size=(1200, 1000)):
        from selenium.webdriver.support.ui import WebDriverWait

        page = given if not runs else trace_page.write(tmp_path / "kept.html", given, runs, question="where?")
        driver.set_window_size(*size)
        driver.get(page.as_uri())
        WebDriverWait(driver, 20).until(lambda d: d.execute_script("return document.documentElement.dataset.ready"))
        return driver

    yield show
    assert browser.complaints(driver) == []
    asked = driver.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [name for name in asked if not name.startswith("data:")] == []


def captions(driver):
    return [one.text for one in driver.find_elements("tag name", "figcaption")]


def expected(trace, stage):
    """The captions at a stage, from the trace: 0 is the prompt, 1 the input of layer 0."""
    lines = []
    for row in rows_of(trace.media[0], [[None] * 99 for _ in trace.media[0]]):
        own = row.tokens[row.tokens >= 0].unique()
        alive = torch.ones(int(trace.total[0]) + 1) if stage == 0 else coverage(trace, stage - 1, 0)
        kept, merged = int((alive[own] == 1).sum()), int((alive[own] == 0.5).sum())
        lines.append(f"{kept} of {len(own)}" + (f", {merged} merged into them" if merged else ""))
    return lines


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_the_slider_shows_what_each_layer_has(scene, opened):
    from selenium.webdriver.common.keys import Keys

    trace, given = scene()
    driver = opened(given, MethodRun(trace))
    slider = driver.find_element("id", "layer")
    slider.send_keys(Keys.HOME)
    for stage in range(len(trace.tokens) + 2):
        assert slider.get_attribute("value") == str(stage)
        assert [line.partition(": ")[2] for line in captions(driver)] == expected(trace, stage)
        assert slider.get_attribute("aria-valuetext") == driver.find_element("id", "place").text
        slider.send_keys(Keys.ARROW_RIGHT)
    assert captions(driver)[0].split(":")[0].startswith(("image", "video"))
    if scene in (video, packed_video):
        assert len(driver.find_elements("css selector", ".strip figure")) == len(captions(driver))
        assert "frame 1" in captions(driver)[0]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_hovering_and_arrow_keys_name_the_group(scene, opened):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    trace, given = scene()
    driver = opened(given, MethodRun(trace))
    facts = trace_page.facts(given, [MethodRun(trace)])
    owner, rows = facts["methods"][0]["owner"], facts["rows"]
    groups = {token: own for token, own in enumerate(owner) if own >= 0 and owner.count(own) > 1 and own != token}
    said = driver.find_element("id", "said")
    token, own = next(iter(groups.items()))
    place = next(r for r, row in enumerate(rows) if token in row["tokens"])
    row, cell = rows[place], rows[place]["tokens"].index(token)
    canvas = driver.find_elements("tag name", "canvas")[place]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    x = (cell % row["width"] + 0.5) / row["width"] - 0.5
    y = (cell // row["width"] + 0.5) / row["height"] - 0.5
    before = pixels(driver, place)
    width, height = canvas.size["width"], canvas.size["height"]
    ActionChains(driver).move_to_element_with_offset(canvas, int(x * width), int(y * height)).perform()
    assert f"a group of {owner.count(own)}" in said.text
    assert f"row {cell // row['width'] + 1}, column {cell % row['width'] + 1}" in said.text
    assert (pixels(driver, place) != before).any()
    canvas = driver.find_elements("tag name", "canvas")[0]
    driver.execute_script("arguments[0].focus()", canvas)
    texts = []
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN):
        ActionChains(driver).send_keys(key).perform()
        texts.append(re.search(r"row (\d+), column (\d+)", said.text).groups())
    assert len(set(texts)) >= 2
    ActionChains(driver).send_keys(Keys.ESCAPE).perform()
    assert "Point at a patch" in said.text


def pixels(driver, place):
    data = driver.execute_script(
        "const c = document.querySelectorAll('canvas')[arguments[0]];"
        "return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)",
        place,
    )
    return np.array(data, np.uint8).reshape(-1, 4)


def test_colours_say_what_became_of_a_patch(opened):
    trace, given = one_image()
    driver = opened(given, MethodRun(trace))
    (row,) = trace_page.facts(given, [MethodRun(trace)])["rows"]
    side = driver.execute_script("return document.querySelector('canvas').width") // row["width"]
    image = pixels(driver, 0).reshape(row["height"] * side, row["width"] * side, 4).astype(int)
    alive = coverage(trace, len(trace.tokens) - 1, 0)
    for cell, token in enumerate(row["tokens"]):
        y, x = (cell // row["width"] * side + side // 2, cell % row["width"] * side + side // 2)
        red, green, blue, _ = image[y, x]
        if alive[token] == 1:
            assert red > 150 > 80 > max(green, blue)
        elif alive[token] == 0.5:
            assert blue > green
        else:
            assert abs(green - blue) < 20 < green - 100


def test_methods_stand_side_by_side_and_attention_can_be_seen(opened):
    from selenium.webdriver.support.ui import Select

    model, inputs = clone(LLAMA), batch(LLAMA, (1,))
    runs = []
    for method in ("mustdrop", "fastv", "uniform"):
        with mustdrop.patched(model, method, keep=0.4):
            answer(model, inputs, steps=1)
            runs.append(MethodRun(mustdrop.last_trace(model), f"answer of {method}"))
    driver = opened(picture(), *runs)
    tops = [section.rect["y"] for section in driver.find_elements("css selector", "#methods > section")]
    assert len(tops) == 3
    assert len(set(tops)) == 1
    table = driver.find_element("id", "costs").text
    assert all(f"answer of {one.trace.method}" in table for one in runs)
    assert all(f"{float(one.trace.equal_tokens[0]):.1f}" in table for one in runs)
    show = Select(driver.find_element("id", "show"))
    heat = [option.text for option in show.options if "words" in option.text]
    assert f"attention of the words in layer {runs[1].trace.filters[0]}" in heat
    before = pixels(driver, 1)
    show.select_by_visible_text(f"attention of the words in layer {runs[1].trace.filters[0]}")
    assert (pixels(driver, 1) != before).any()
    assert "least to most attention" in driver.find_element("id", "legend").text
    assert "not read by this method" in captions(driver)[2]
    driver.set_window_size(420, 900)
    tops = [section.rect["y"] for section in driver.find_elements("css selector", "#methods > section")]
    assert len(set(tops)) == 3
    wide = driver.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0


def test_a_screen_reader_has_names_for_everything(opened):
    trace, given = video()
    driver = opened(given, MethodRun(trace))
    assert driver.find_element("id", "layer").accessible_name == "Stage"
    assert driver.find_element("id", "show").accessible_name == "Show"
    assert driver.find_element("id", "said").aria_role == "status"
    for canvas in driver.find_elements("tag name", "canvas"):
        assert canvas.get_attribute("tabindex") == "0"
        assert re.search(r"frame \d+: \d+ of \d+.* tokens, into layer \d", canvas.accessible_name)
    assert driver.find_element("id", "costs").accessible_name == "Tokens, FLOPs, cache"
    heads = driver.find_elements("css selector", "table th")
    assert heads
    assert all(head.get_attribute("scope") in ("row", "col") for head in heads)


# -- the command -------------------------------------------------------------------------------------------------------


def explain(monkeypatch, capsys, folder):
    """The page that the command writes of a picture, and what it prints."""
    picture((90, 60)).save(folder / "red.png")
    out = folder / "kept.html"
    code, said, _ = call(
        monkeypatch, capsys, "explain", "--image", folder / "red.png", "--question", "what is red ?",
        "--method", "mustdrop", "--method", "uniform", "--keep", "64", "--new-tokens", "2", "--out", out,
    )  # fmt: skip
    assert code == 0
    return out, said


def test_explain_writes_the_page_of_a_picture(monkeypatch, capsys, tmp_path):
    out, said = explain(monkeypatch, capsys, tmp_path)
    assert "mustdrop, keep=64:" in said
    (inner,) = re.findall(r'id="facts">(.*?)</script>', out.read_text(encoding="utf-8"), re.DOTALL)
    facts = json.loads(inner)
    assert [method["name"] for method in facts["methods"]] == ["mustdrop, keep=64", "uniform, keep=64"]
    assert facts["question"] == "what is red ?"


def test_the_page_of_explain_works_in_a_browser(monkeypatch, capsys, tmp_path, opened):
    from selenium.webdriver.common.keys import Keys

    out, _ = explain(monkeypatch, capsys, tmp_path)
    driver = opened(out)
    heads = [head.text for head in driver.find_elements("css selector", "#methods > section h2")]
    assert heads == ["mustdrop, keep=64", "uniform, keep=64"]
    slider = driver.find_element("id", "layer")
    slider.send_keys(Keys.HOME)
    before = captions(driver)
    slider.send_keys(Keys.END)
    assert captions(driver) != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "x.png"], "need --question"),
        (["--image", "x.png", "--video", "y.mp4", "--question", "?"], "not both"),
        (["--model", "a/b"], "--model needs"),
        (["--image", "x.png", "--question", "?"], "x.png"),
        (["--video", "y.mp4", "--question", "?"], "y.mp4"),
        (["--method", "no_such"], "no_such"),
        (["--keep", "0"], "--keep"),
        (["--out", "."], "is a folder"),
    ],
)
def test_explain_refuses_before_a_model_is_loaded(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mustdrop.demo.model.load", lambda *given: pytest.fail("a model was loaded"))
    code, _, said = call(monkeypatch, capsys, "explain", *arguments)
    assert code == 2
    assert message in said
    assert "Traceback" not in said
