"""The report of a run: what it says and shows, and that nothing in it acts."""

import base64
import math
import re
import resource
from html.parser import HTMLParser
from io import BytesIO
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from examples.llama.reporting.report import plot_losses, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = "<script>alert('x')</script>\"&amp;</pre></style>$x_1$"


class Page(HTMLParser):
    """A page whose tags are checked to be nested well, as its parts."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.attributes, self.open = "", [], [], []
        self.images = {}  # decoded, by alternative text
        self.tables = {}  # cells by id
        self.pre = []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        attrs = dict(attrs)
        if tag == "img":
            kind, _, data = attrs["src"].partition(",")
            assert kind == "data:image/svg+xml;base64"
            self.images[attrs["alt"]] = base64.b64decode(data, validate=True).decode()
        elif tag == "table":
            self.table = self.tables[attrs["id"]] = []
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.table[-1].append("")
        elif tag == "pre":
            self.pre.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.table[-1][-1] = f"{self.table[-1][-1]} {data.strip()}".strip()
        if "pre" in self.open:
            self.pre[-1] += data


@pytest.fixture
def report(tmp_path):
    """Writes a report of a run of which nothing is known but what is given."""

    def write(**given):
        nothing = {"title": "Run", "config": {}, "metrics": [], "before": {}}
        nothing |= {"after": {}, "per_tensor": {}, "samples": []}
        write_report(tmp_path / "report.html", **nothing | given)
        assert [x.name for x in tmp_path.iterdir()] == ["report.html"]
        return Page(tmp_path / "report.html")

    return write


def metrics_of(steps, every=4):
    lines = []
    for step in range(steps + 1):
        rate = {"learning_rate": 1e-3 * (1 - step / steps), "tokens_per_second": 9e3}
        if step:
            lines.append({"step": step, "loss": 2 + 3 / step} | rate)
        if step % every == 0 or step == steps:
            measures = {"eval_loss": 5 - step / steps, "retain_loss": 1 + step / steps}
            measures |= {"kl": step / 100, "distance": step / 10, "touched": 0.5}
            lines.append({"step": step} | measures)
    return lines


def tensors_of(layers, **values):
    layer = [f"self_attn.{x}_proj.kernel" for x in "qkvo"]
    layer += [f"mlp.{x}_proj.kernel" for x in ("gate", "up", "down")]
    layer += ["input_layernorm.scale", "post_attention_layernorm.scale"]
    names = [f"layers.{i}.{x}" for i in range(layers) for x in layer]
    names += ["embed_tokens.embedding", "norm.scale", "lm_head.kernel"]
    return {name: dict(values) for name in names}


def texts_in(svg):
    """What is written in a drawing of matplotlib's, which leaves it as comments."""
    return re.findall(r"<!-- (.*?) -->", svg)


def image_of(page, title):
    (found,) = [svg for alt, svg in page.images.items() if alt.startswith(title)]
    return found


# The page


def test_nothing_is_loaded_and_nothing_runs(report):
    page = report(
        metrics=metrics_of(12),
        per_tensor=tensors_of(2, distance=0.5, norm=2.0, touched=0.25),
        samples=[{"prompt": "p", "before": "b", "after": "a"}],
    )
    assert len(page.images) == 8
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert "href" not in names and not any(name.startswith("on") for name in names)
    style = page.text[: page.text.index("Learning and forgetting")]
    assert "url(" not in style and "@import" not in style
    policy = [value for name, value in page.attributes if name == "content"]
    assert any("default-src 'none'" in value for value in policy)
    for svg in page.images.values():
        for element in ElementTree.fromstring(svg).iter():
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith(("#", "data:image/png;base64,"))
                assert not re.search(r"url\((?!#)", value)


def test_light_and_dark(report):
    page = report(metrics=metrics_of(12), per_tensor=tensors_of(1, distance=0.5))
    assert "@media (prefers-color-scheme: dark)" in page.text
    assert "@media print" in page.text
    for svg in page.images.values():
        assert "@media (prefers-color-scheme: dark)" in svg
        fixed = {x.lower() for x in re.findall(r"(?:fill|stroke): (#\w+)", svg)}
        assert "currentColor" in svg and not {"#000000", "#1b2026"} & fixed


def test_same_run_same_file(report, tmp_path):
    given = {"metrics": metrics_of(60), "per_tensor": tensors_of(1, touched=0.5)}
    report(**given)
    first = (tmp_path / "report.html").read_bytes()
    report(**given)
    assert (tmp_path / "report.html").read_bytes() == first


def test_what_models_and_data_contain_is_only_text(report):
    page = report(
        title=HOSTILE,
        config={HOSTILE: HOSTILE, "list": [HOSTILE], "deep": {HOSTILE: 1}},
        metrics=[{"step": 1, "loss": 2.0, HOSTILE: 3.0}],
        per_tensor={HOSTILE: {"distance": 1.0}, f"layers.0.{HOSTILE}": {"touched": 1}},
        samples=[dict.fromkeys(("prompt", "before", "after", "expected"), HOSTILE)],
    )
    assert "script" not in page.tags and page.tags.count("style") == 1
    assert page.text.count(HOSTILE) == 11  # the title twice
    assert page.tables["config"][0] == [HOSTILE, HOSTILE]
    assert page.tables["config"][2] == [f"deep.{HOSTILE}", "1"]
    assert [row[0] for row in page.tables["tensors"][1:]] == [
        HOSTILE,
        f"layers.0.{HOSTILE}",
    ]
    assert page.pre == ["\n" + HOSTILE] * 4  # the first line end is the tag's


def test_half_a_surrogate_pair(report):
    page = report(samples=[{"prompt": "\ud800é", "before": "😀", "after": "\x00"}])
    assert page.pre[0] == "\n?é" and page.pre[1] == "\n😀"


def test_samples(report):
    texts = {"prompt": "Q\n  indented", "before": "\nfirst", "after": "last"}
    page = report(samples=[texts, texts | {"expected": "right"}])
    both = ["\nQ\n  indented", "\n\nfirst", "\nlast"]
    assert page.pre == [*both, *both, "\nright"]
    assert page.text.count("Expected") == 1


def test_configuration(report):
    config = {"steps": 4, "data": ["a:1", "b:2"], "empty": None, "on": True}
    page = report(config=config | {"versions": {"jax": "0.10", "deep": {"x": 1e-5}}})
    assert page.tables["config"] == [
        ["steps", "4"],
        ["data", '["a:1", "b:2"]'],
        ["empty", "None"],
        ["on", "True"],
        ["versions.jax", "0.10"],
        ["versions.deep.x", "1e-05"],
    ]


def test_summary(report):
    before = {"eval_loss": 5.25, "retain_loss": 1.5, "distance": 0, "touched": 0}
    after = {"eval_loss": 2, "retain_loss": math.nan, "kl": 0.125, "touched": 0.25}
    after |= {"seconds": 61.24, "tokens_per_second": 12345.4, "mfu": 0.456}
    page = report(before=before, after=after | {"distance": np.float32(12.5)})
    assert page.tables["summary"][1:] == [
        ["Held-out loss nats per answer token", "5.2500", "2.0000", "−3.2500"],
        ["Retained-text loss nats per token", "1.5000", "not finite", "–"],
        ["KL from the pretrained model nats per token", "–", "0.1250", "–"],
        ["Distance from the pretrained weights Euclidean norm", "0", "12.50", "+12.50"],
        ["Entries ever touched share of all entries", "0%", "25.00%", "+25.00 points"],
    ]
    assert page.tables["speed"][1:] == [
        ["Tokens per second", "12,345"],
        ["MFU, of the device's peak FLOP/s", "45.60%"],
        ["Training time", "61.2 s"],
    ]
    page = report(after={"seconds": 7384.0, "mfu": None, "kl": None})
    assert page.tables["speed"][1:] == [["Training time", "2:03:04 (h:min:s)"]]
    assert page.tables["summary"][1][1:] == ["–", "not finite", "–"]


@pytest.mark.parametrize("metrics", [[], [{"step": 1, "loss": 2.5}]])
def test_little_is_known(report, metrics):
    page = report(metrics=metrics)
    assert (
        page.tables == {} and page.pre == [] and page.tags.count("h2") == len(metrics)
    )
    assert list(page.images) == ["Loss: 2.5000 at step 1"] * len(metrics)


# Curves


def test_curves(report):
    page = report(metrics=metrics_of(12))
    assert list(page.images) == [
        "Loss: 5.0000 at step 1 to 2.2500 at step 12",
        "Retained-text loss: 1.0000 at step 0 to 2.0000 at step 12",
        "KL from the pretrained model: 0.0000 at step 0 to 0.1200 at step 12",
        "Distance from the pretrained weights: 0 at step 0 to 1.200 at step 12",
        "Entries ever touched: 50.00% at step 0 to 50.00% at step 12",
        "Learning rate: 0.0009167 at step 1 to 0 at step 12",
    ]
    loss = texts_in(image_of(page, "Loss"))
    assert {"training, each batch", "held-out records", "step"} <= set(loss)
    assert "nats per answer token" in loss
    assert not any("mean of" in text for text in loss)
    only_evaluations = [line for line in metrics_of(12) if "loss" not in line]
    first, *_ = report(metrics=only_evaluations).images
    assert first == "Held-out loss: 5.0000 at step 0 to 4.0000 at step 12"


def test_many_steps_are_smoothed_and_stay_small(report):
    metrics, rng = metrics_of(8000, every=1000), np.random.default_rng(0)
    for line in metrics:
        line |= {"loss": 2 + rng.normal()} if "loss" in line else {}
    texts = texts_in(image_of(report(metrics=metrics[:100]), "Loss"))
    assert "training, mean of 3 batches" in texts
    svg = image_of(report(metrics=metrics), "Loss")
    assert "training, mean of 201 batches" in texts_in(svg)
    assert len(svg) < 500_000


def test_a_mean_is_over_its_batches_alone(tmp_path):
    """A constant loss has itself as the mean, up to the first and last step."""
    metrics = [{"step": step, "loss": 2.0} for step in range(1, 101)]
    plot_losses(metrics, tmp_path / "losses.png")
    image = imread(tmp_path / "losses.png")[..., :3]
    below_legend = image[image.shape[0] // 4 :, : image.shape[1] // 2]
    rows = np.flatnonzero(near(below_legend, (0, 114, 178)).any(axis=1))
    assert 1 <= rows.size <= 6
    # It covers the line of the batches, which would be of another blue.
    assert near(below_legend, (86, 180, 233)).sum() == 0


def test_values_that_are_not_finite(report):
    metrics = metrics_of(12)
    metrics[3] |= {"loss": None}
    metrics[4] |= {"loss": math.inf}
    metrics[-1] |= {"kl": math.nan, "eval_loss": None}
    page = report(metrics=metrics)
    assert re.findall(r".+ is not finite at step .+", page.text) == [
        "loss is not finite at step 3, the first of 2 times.",
        "eval_loss is not finite at step 12.",
        "kl is not finite at step 12.",
    ]
    assert "KL from the pretrained model: 0.0000 at step 0 to 0.0800 at step 8" in (
        page.images
    )
    lost = [{"step": 1, "loss": None, "learning_rate": 1e-3}]
    assert list(report(metrics=lost).images) == ["Learning rate: 0.001000 at step 1"]


def test_entries_that_cannot_move(report):
    metrics = metrics_of(12)
    assert "cannot move" not in report(metrics=metrics).text
    metrics[-2] |= {"stuck_entries": 7}
    metrics[-1] |= {"stuck_entries": 1234}
    assert (
        "Entries that cannot move any more, as their second moment is infinite: 1,234. "
        f"First seen at step {metrics[-2]['step']}."
    ) in report(metrics=metrics).text


def test_of_a_step_done_twice_the_later_line_counts(report):
    metrics = [{"step": step, "loss": step / 2} for step in (1, 2, 3, 2, 3, 4, 1)]
    metrics[-1]["loss"] = 7.0
    page = report(metrics=metrics)
    assert list(page.images) == ["Loss: 7.0000 at step 1 to 2.0000 at step 4"]


def near(image, colour):
    return np.abs(image - np.array(colour) / 255).max(axis=-1) < 0.02


@pytest.mark.parametrize("steps", [1, 15, 80])
def test_plot_losses(tmp_path, steps):
    plot_losses(metrics_of(steps), tmp_path / "losses.png")
    assert [x.name for x in tmp_path.iterdir()] == ["losses.png"]
    image = imread(tmp_path / "losses.png")[..., :3]
    height, width, _ = image.shape
    assert 400 <= height <= 1500 and 1000 <= width <= 3000
    halves = image[:, : width // 2], image[:, width // 2 :]
    blue, orange = (
        [near(half, colour).sum() for half in halves]
        for colour in ((0, 114, 178), (213, 94, 0))
    )
    assert blue[0] > 100 and blue[1] == 0 and min(orange) > 100


def test_plot_losses_of_nothing(tmp_path):
    plot_losses([], tmp_path / "losses.png")
    assert imread(BytesIO((tmp_path / "losses.png").read_bytes())).shape[2] == 4


# Heat maps


COLUMNS = ["q", "k", "v", "o", "gate", "up", "down", "norms"]


def layer_cells(svg):
    """What is written in the cells of the layers, row by row."""
    texts = texts_in(svg)
    assert texts[:8] == COLUMNS
    texts = texts[texts.index("layer") + 1 :]
    end = texts.index("embedding") if "embedding" in texts else len(texts)
    return [texts[i : i + 8] for i in range(0, end // 8 * 8, 8)]


def fills_of(svg):
    """The colours of the cells of the layers, row by row."""
    mesh = re.search(r'<g id="QuadMesh_1">(.*?)</g>', svg, re.DOTALL)[1]
    fills = re.findall(r"fill: (#\w+)", mesh)
    return [fills[i : i + 8] for i in range(0, len(fills), 8)]


def test_relative_distance(report):
    tensors = tensors_of(3, distance=0.0, norm=4.0)
    tensors["layers.2.mlp.up_proj.kernel"]["distance"] = 0.5
    # Both norms of a layer together: 5 of 10.
    norms = {"input": (3.0, 6.0), "post_attention": (4.0, 8.0)}
    for name, (distance, norm) in norms.items():
        values = {"distance": distance, "norm": norm}
        tensors[f"layers.1.{name}_layernorm.scale"] = values
    tensors["lm_head.kernel"]["distance"] = 0.1
    page = report(per_tensor=tensors)
    alt = "Relative distance per layer, largest in norms of layer 1: 50.00%"
    assert list(page.images) == [alt]
    zeros = ["0%"] * 8
    rows = [zeros, [*zeros[:7], "50%"], [*zeros[:5], "12%", *zeros[6:]]]
    assert layer_cells(page.images[alt]) == rows
    texts = texts_in(page.images[alt])
    below = ["embedding", "head", "final norm", "0%", "2.5%", "0%"]
    start = texts.index("embedding")
    assert texts[start : start + 6] == below
    # From 0 to the largest: viridis's ends, and a quarter of the way.
    fills, viridis = fills_of(page.images[alt]), matplotlib.colormaps["viridis"]
    colours = [matplotlib.colors.to_hex(viridis(x)) for x in (0.0, 0.25, 1.0)]
    assert [fills[0][0], fills[2][5], fills[1][7]] == colours
    rows = {row[0]: row[1:] for row in page.tables["tensors"]}
    assert rows["Tensor"] == ["Distance", "Pretrained norm", "Distance / norm"]
    assert rows["layers.2.mlp.up_proj.kernel"] == ["0.5000", "4.000", "12.50%"]
    assert len(rows) == 1 + len(tensors)


def test_distance(report):
    tensors = tensors_of(2, distance=3.0)
    tensors["layers.1.input_layernorm.scale"]["distance"] = 4.0
    del tensors["lm_head.kernel"]
    page = report(per_tensor=tensors)
    svg = image_of(page, "Distance per layer, largest in norms of layer 1: 5.000")
    assert layer_cells(svg) == [["3.0"] * 7 + ["4.2"], ["3.0"] * 7 + ["5.0"]]
    texts = texts_in(svg)
    start = texts.index("embedding")
    assert texts[start : start + 4] == ["embedding", "final norm", "3.0", "3.0"]


def test_touched(report):
    tensors = tensors_of(2, touched=0.25, size=30)
    tensors["layers.0.input_layernorm.scale"] |= {"touched": 1.0, "size": 10}
    tensors["layers.1.self_attn.k_proj.kernel"] = {"touched": 0.0316, "size": 30}
    page = report(per_tensor=tensors)
    svg = image_of(page, "Entries ever touched per layer, largest in norms of layer 0")
    row = ["25%"] * 7
    assert layer_cells(svg) == [[*row, "44%"], ["25%", "3.2%", *row[1:]]]
    cividis = matplotlib.colormaps["cividis"]
    assert fills_of(svg)[0][7] == matplotlib.colors.to_hex(cividis(1.0))
    assert page.tables["tensors"][1][1:] == ["30", "25.00%"]


def test_where_the_metric_holds_still(report):
    about = {"source": "self", "model": "m", "texts": 32, "max_length": 256}
    about |= {"temperature": 1.0, "seed": 7}
    steps = tensors_of(2, step=1.5, size=30)
    steps["layers.1.self_attn.v_proj.kernel"] = {"step": 0.05, "size": 30}
    steps["layers.0.input_layernorm.scale"] = {"step": 0.5, "size": 10}
    page = report(importance=about, steps=steps)
    alt = "Typical step per layer, smallest in v of layer 1: 0.05000"
    assert list(page.images) == [alt]
    row = ["1.5"] * 8
    first, second = [*row[:7], "1.2"], ["1.5", "1.5", "0.050", *row[:5]]
    assert layer_cells(page.images[alt]) == [first, second]
    drawn = (
        "texts that the pretrained model itself wrote: 32 texts of up to 256 tokens, "
        "drawn at temperature 1 with seed 7."
    )
    text = " ".join(page.text.split())
    assert "Where the metric holds still" in text and drawn in text
    page = report(importance=about | {"source": f"f{HOSTILE}"}, steps=steps)
    assert f"It was read from f{HOSTILE}." in page.text and "the model m" in page.text
    assert "Where the metric" not in report(metrics=metrics_of(4)).text


@pytest.mark.parametrize("layers", [1, 32, 80])
def test_any_number_of_layers(report, layers):
    page = report(per_tensor=tensors_of(layers, distance=1.0, norm=8.0, touched=0.5))
    assert len(page.images) == 2
    for svg in page.images.values():
        texts = texts_in(svg)
        named = texts[8 : texts.index("layer")]
        assert len(fills_of(svg)) == layers
        if layers <= 32:
            assert named == [str(i) for i in range(layers)]
            assert len(layer_cells(svg)) == layers
        else:
            assert named == [str(i) for i in range(0, layers, 5)]
            assert layer_cells(svg) == []


def test_cells_without_a_value_are_grey(report):
    tensors = tensors_of(2, distance=1.0, norm=4.0)
    tensors["layers.0.self_attn.q_proj.kernel"]["distance"] = math.nan
    del tensors["layers.0.self_attn.k_proj.kernel"]
    del tensors["layers.0.self_attn.v_proj.kernel"]["norm"]
    tensors["layers.0.self_attn.o_proj.kernel"]["norm"] = 0.0
    tensors["layers.1.mlp.up_proj.kernel"]["distance"] = None
    page = report(per_tensor=tensors)
    svg = image_of(page, "Relative distance per layer, largest in gate of layer 0")
    grey = [[x == "#9e9e9e" for x in row] for row in fills_of(svg)]
    assert grey == [[True] * 4 + [False] * 4, [False] * 5 + [True] + [False] * 2]
    table = {row[0]: row[1:] for row in page.tables["tensors"]}
    assert table["layers.0.self_attn.v_proj.kernel"] == ["1.000", "–", "–"]
    odd = ["not finite", "4.000", "not finite"]
    assert table["layers.0.self_attn.q_proj.kernel"] == odd


def test_nothing_has_moved(report):
    page = report(per_tensor=tensors_of(1, distance=0.0, norm=1.0, touched=0.0))
    for svg in page.images.values():
        assert layer_cells(svg) == [["0%"] * 8]


def test_tensors_of_other_names(report):
    tensors = {"encoder.weight": {"touched": 0.5}, "norm.scale": {"touched": 1.0}}
    page = report(per_tensor=tensors)
    (alt,) = page.images
    assert alt == "Entries ever touched per layer, largest in final norm: 100.0%"
    assert "1 tensors of other names are in the table only." in page.text
    assert "encoder.weight" in [row[0] for row in page.tables["tensors"]]
    del tensors["norm.scale"]
    page = report(per_tensor=tensors)
    assert page.images == {} and len(page.tables["tensors"]) == 2


# Files


def test_a_failure_leaves_the_last_report(report, tmp_path):
    report(metrics=metrics_of(4))
    before = (tmp_path / "report.html").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            report(metrics=metrics_of(4), per_tensor=tensors_of(4, touched=1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "report.html").read_bytes() == before
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "taken", tmp_path / "absent" / "file"):
        with pytest.raises(OSError, match=path.name):
            plot_losses([], path)
    assert {x.name for x in tmp_path.iterdir()} == {"report.html", "taken"}
