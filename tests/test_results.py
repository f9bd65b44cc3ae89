"""The files of a run, and the tables and pictures of a sweep."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import yaml

import fishermask
from fishermask.config import ExperimentConfig, StrategyConfig, hash_json, parse
from fishermask.errors import InputError
from fishermask.results import curves, report
from fishermask.results.files import (
    JournalFile,
    RunFolder,
    locked,
    make_folder,
    run_folders,
    write_atomically,
    write_pool,
)
from fishermask.results.provenance import describe_mixed_runs
from fishermask.results.tables import display_labels, format_value, read_rounds, short_names, summarize


def make_result(index, accuracy, labels=None):
    return {
        "round": index,
        "labels": labels or 10 * (index + 1),
        "accuracy": accuracy,
        "balanced_accuracy": accuracy / 2,
        "macro_f1": accuracy / 4,
        "recall": {"cat": accuracy, "T-shirt/top": 0.0},
        "epochs": 3,
        "train_accuracy": 1.0,
        "ended_by": "cap" if index else "target",
        "seconds": {"train": 1.0, "evaluate": 0.5, "query": 2.0},
        "batch": ["a"] * (1 - index),
        "batch_classes": {"cat": 1 - index, "T-shirt/top": 0},
    }


BUDGET = {"initial": 10, "query": 10, "total": 30}


def make_sweep(folder, grid=()):
    """Return an empty sweep folder whose runs vary the paths of ``grid``."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "s", "grid": dict.fromkeys([*grid, "seed"], [])}))
    return folder


def add_run(sweep, strategy, seed=0, accuracies=(0.2, 0.4, 0.6), **settings):
    """Add a run of three planned rounds; return its folder."""
    config = parse(ExperimentConfig, {"budget": BUDGET, **settings, "strategy": strategy, "seed": seed})
    run = RunFolder(sweep / "runs" / f"run-{len(run_folders(sweep)):02d}")
    run.create(config, {}, "p.csv")
    for index, accuracy in enumerate(accuracies):
        run.append(make_result(index, accuracy))
    return run


FINALS = {
    ("margin", 1, 0): 0.6, ("margin", 1, 1): 0.8, ("random", 1, 0): 0.4, ("random", 1, 1): 0.9,
    ("margin", 20, 0): 0.5, ("random", 20, 0): 0.4,
}  # fmt: skip


@pytest.fixture
def sweep(tmp_path):
    """Six finished runs: accuracy 0.2 in round 0, 0.3 in round 1, the value of FINALS in round 2."""
    folder = make_sweep(tmp_path / "s", ["imbalance.ratio"])
    for (strategy, ratio, seed), accuracy in FINALS.items():
        add_run(folder, strategy, seed, (0.2, 0.3, accuracy), imbalance={"kind": "step", "ratio": ratio})
    return folder


def read_summary(sweep, *index):
    return summarize(read_rounds(sweep)[0]).set_index([*index, "strategy"])


def test_table_has_a_row_per_round_and_a_column_per_varied_setting(sweep):
    table, unfinished = read_rounds(sweep)
    assert len(table) == 3 * len(FINALS)
    assert unfinished == []
    assert list(table.columns[:6]) == ["run", "strategy_name", "strategy", "imbalance.ratio", "seed", "finished"]
    assert {"labels", "accuracy", "recall.cat", "batch_classes.cat", "seconds.query", "ended_by"} <= set(table.columns)
    row = table[(table["run"] == "run-01") & (table["round"] == 2)].iloc[0]
    assert (row["accuracy"], row["seed"], row["labels"], row["imbalance.ratio"]) == (0.8, 1, 30, 1.0)


def test_summary_pairs_each_strategy_with_random_of_the_same_seed_and_leaves_out_round_0(sweep):
    summary = read_summary(sweep, "imbalance.ratio")
    margin = summary.loc[(1.0, "margin")]
    # Balanced accuracy in rounds 1 and 2: margin (.15 .30) and (.15 .40), random (.15 .20) and (.15 .45).
    assert margin["mean_balanced_accuracy"] == pytest.approx((0.225 + 0.275) / 2)
    assert margin["gain"] == pytest.approx((0.05 - 0.025) / 2)
    assert margin["gain_sd"] == pytest.approx(0.075 / 2**0.5)
    assert (margin["wins"], margin["pairs"], margin["seeds"], margin["labels"]) == (1, 2, 2, 30)
    assert margin["final_accuracy"] == pytest.approx(0.7)
    assert pd.isna(summary.loc[(20.0, "margin")]["gain_sd"])


def test_unfinished_runs_do_not_count_in_the_summary_and_the_page_lists_them(sweep):
    before = summarize(read_rounds(sweep)[0])
    ratio = {"imbalance": {"kind": "step", "ratio": 1}}
    add_run(sweep, "margin", 2, (0.9, 0.9), **ratio)
    failed = add_run(sweep, "random", 2, (0.9,), **ratio)
    failed.error.write_text("Traceback (most recent call last):\n  ...\nFloatingPointError: the loss | is nan\n")
    add_run(sweep, "bait", 2, (), **ratio)
    add_run(sweep, "entropy", 2, (0.9, 0.9), **ratio)
    report.write(sweep)
    summary = summarize(read_rounds(sweep)[0])
    finished = summary[summary["seeds"] > 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(finished, before.reset_index(drop=True), check_dtype=False)
    assert summary[summary["seeds"] == 0]["strategy"].tolist() == ["entropy"]
    page = (sweep / "summary.md").read_text()
    assert "4 runs are not finished" in page
    section = page.split("## Unfinished runs")[1].splitlines()
    assert "| run-06 | 2 of 3 |  |" in section
    assert "| run-07 | 1 of 3 | FloatingPointError: the loss \\| is nan |" in section
    assert "| run-08 | 0 of 3 |  |" in section
    assert "| 1 | entropy | 0 | – | – | – | – | – | – | – |" in page


def test_report_notes_different_numbers_of_seeds(sweep):
    page = report.format_notes(report.write(sweep))
    assert "Cells have different numbers of seeds (1 to 2)." in page


def add_identified_run(sweep, seed, epochs=3, version="0.1.0", device="cpu", strategy="random", accuracies=(0.2, 0.4)):
    """Add a run whose rounds record their identity."""
    settings = {"training": {"max_epochs": epochs}, "seed": seed, "strategy": {"name": strategy}}
    identity = {"fishermask": version, "code": {"strategy.name": strategy}, "device": {"trial": device}}
    identity |= {"threads": 1, "settings": settings}
    run = add_run(sweep, strategy, seed, ())
    run.create(run.config(), identity, "p.csv")
    for index, accuracy in enumerate(accuracies):
        run.append(make_result(index, accuracy) | {"identity": hash_json(identity)})


def test_report_notes_runs_with_different_settings_versions_and_devices(tmp_path):
    folder = make_sweep(tmp_path / "s")
    for seed in range(6):
        add_identified_run(folder, seed, strategy=("margin", "random")[seed % 2])
    assert not any("different s" in note for note in report.format_notes(report.write(folder)))
    for seed in (6, 7):
        add_identified_run(folder, seed, epochs=40)
    expected = (
        "The runs have different settings: training.max_epochs is 3 in 6 runs and 40 in 2 runs (column config_hash)."
    )
    assert expected in report.format_notes(report.write(folder))
    assert expected in (folder / "summary.md").read_text()
    add_identified_run(folder, 8, version="0.2.0", device="cuda")
    assert (
        "The runs have different software or devices: fishermask is '0.1.0' in 8 runs and '0.2.0' in 1 run; "
        "device.trial is 'cpu' in 8 runs and 'cuda' in 1 run (provenance.json of each run)."
    ) in report.format_notes(report.write(folder))
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "s", "grid": {"training.max_epochs": [], "seed": []}}))
    assert not any("different settings" in note for note in report.format_notes(report.write(folder)))


def test_continued_run_counts_once_for_each_value():
    old, new = ({"fishermask": version, "threads": threads} for version, threads in (("a", 1), ("b", 1)))
    assert describe_mixed_runs([[old, new], [old], [new | {"threads": 2}]], ()) == {
        "fishermask": ["fishermask is 'a' in 2 runs and 'b' in 2 runs"],
        "threads": ["threads is 1 in 2 runs and 2 in 1 run"],
    }


def test_report_notes_runs_outside_the_current_grid(sweep):
    grid = {"run-00", "run-01", "run-02", "run-05", "another"}
    note = "2 of 6 runs in the folder are not in the current grid; the tables include them."
    assert note in report.format_notes(report.write(sweep, grid=grid))
    assert note in (sweep / "summary.md").read_text()
    for names in (None, {folder.path.name for folder in run_folders(sweep)}):
        assert "current grid" not in " ".join(report.format_notes(report.write(sweep, grid=names)))


def test_report_notes_capped_training_and_a_missing_baseline(tmp_path):
    folder = make_sweep(tmp_path / "s")
    add_run(folder, "margin")
    notes = report.format_notes(report.write(folder))
    assert "Training ended at training.max_epochs in 2 of 3 rounds." in notes
    assert "The gain needs runs of the strategy random." in notes
    add_run(folder, "random")
    assert not any("The gain" in note for note in report.format_notes(report.write(folder)))


def test_baseline_is_the_strategy_random_whatever_the_labels(tmp_path):
    folder = make_sweep(tmp_path / "s")
    add_run(folder, {"name": "margin", "label": "random"}, accuracies=(0.2, 0.2, 0.8))
    add_run(folder, {"name": "random", "label": "uniform"}, accuracies=(0.2, 0.2, 0.4))
    summary = read_summary(folder)
    assert summary.loc["random", "gain"] == pytest.approx(0.1)
    _, rows = report.format_summary(report.write(folder).summary)
    assert [row[-2] for row in rows] == ["+0.100", "–"]


def test_two_strategies_with_one_label_stay_two_rows(tmp_path):
    folder = make_sweep(tmp_path / "s")
    add_run(folder, {"name": "margin", "label": "random"}, accuracies=(0.2, 0.2, 0.8))
    add_run(folder, "random", accuracies=(0.2, 0.2, 0.4))
    summary = read_summary(folder)
    assert summary["final_accuracy"].to_dict() == {"random (margin)": 0.8, "random": 0.4}
    assert summary.loc["random (margin)", "gain"] == pytest.approx(0.1)


def test_settings_with_the_same_last_part_stay_two_columns(tmp_path):
    folder = make_sweep(tmp_path / "s", ["data.name", "model.name", "budget.query"])
    for data in ("fashion_mnist_small", "MNIST"):
        for model in ("mlp", "small_cnn"):
            add_run(folder, "random", data={"name": data}, model={"name": model})
    sweep_report = report.write(folder)
    header, rows = report.format_summary(sweep_report.summary)
    assert header[:4] == ["query", "data.name", "model.name", "strategy"]
    assert sorted(row[:3] for row in rows) == [
        ["10", "MNIST", "mlp"], ["10", "MNIST", "small_cnn"],
        ["10", "fashion_mnist_small", "mlp"], ["10", "fashion_mnist_small", "small_cnn"],
    ]  # fmt: skip
    assert "### query = 10, data.name = MNIST, model.name = mlp" in (folder / "summary.md").read_text()
    assert short_names(["name", "a.name", "b.a.name", "a.x"]) == {
        "name": "name", "a.name": "a.name", "b.a.name": "b.a.name", "a.x": "x",
    }  # fmt: skip


MIXED = {
    "resources.shards": [1, "auto"],
    "imbalance.rare": [None, 3],
    "imbalance.rare_classes": [[1, 2], [3]],
    "model.params": [{"width": 8}, {"width": 8, "depth": 1.5}],
    "data.augment": [None, True],
    "training.clip": [None, 0.5],
    "data.image_column": [None, "image"],
}


@pytest.mark.parametrize("path", MIXED)
def test_settings_of_mixed_types_are_reported(tmp_path, path):
    folder = make_sweep(tmp_path / "s", [path])
    section, field = path.split(".")
    for value in MIXED[path]:
        settings = {"imbalance": {"kind": "step", "ratio": 2}, "model": {"name": "mlp"}}
        settings[section] = settings.get(section, {}) | {field: value}
        add_run(folder, "random", **settings)
        add_run(folder, "margin", accuracies=(0.2, 0.4, 0.8), **settings)
    summary = report.write(folder).summary
    assert summary["gain"].tolist() == pytest.approx([0.05, math.nan] * 2, nan_ok=True)
    _, rows = report.format_summary(summary)
    expected = {
        "resources.shards": {"1", "auto"},
        "imbalance.rare": {"null", "3"},
        "imbalance.rare_classes": {"[1, 2]", "[3]"},
        "model.params": {"width=8", "width=8 depth=1.5"},
        "data.augment": {"null", "true"},
        "training.clip": {"null", "0.5"},
        "data.image_column": {"null", "image"},
    }
    assert {row[0] for row in rows} == expected[path]
    assert len(pd.read_parquet(folder / "results.parquet")) == len(pd.read_csv(folder / "results.csv")) == 12
    assert len(curves.draw(read_rounds(folder)[0], "accuracy", "s").axes) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(20.0, "20"), (1234567.0, "1234567"), (0.123456789, "0.123456789"), (1e30, "1e+30"), (False, "false"),
     (math.nan, "null"), ([[1], ["a"]], "[[1], [a]]")],
)  # fmt: skip
def test_settings_are_written_without_loss(value, text):
    assert format_value(value) == text


def test_null_metrics_are_read_as_nan(sweep):
    for path in sweep.glob("runs/*/rounds.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[-1]["macro_f1"] = None
        for line in lines:
            line["recall"]["T-shirt/top"] = None
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.write(sweep)
    table = pd.read_parquet(sweep / "results.parquet")
    assert table["recall.T-shirt/top"].dtype == table["macro_f1"].dtype == float
    assert table["recall.T-shirt/top"].isna().all()
    assert table[table["round"] == 2]["macro_f1"].isna().all()
    assert summarize(table)["final_macro_f1"].isna().all()
    assert summarize(table)["final_accuracy"].notna().all()


def test_report_writes_tables_a_picture_and_a_page(sweep):
    report.write(sweep)
    pd.testing.assert_frame_equal(pd.read_parquet(sweep / "results.parquet"), read_rounds(sweep)[0])
    assert len(pd.read_csv(sweep / "results.csv")) == 3 * len(FINALS)
    assert (sweep / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (sweep / "summary.md").read_text()
    assert "smoke test" in page
    assert "0.700±0.141" in page
    assert "1 of 2" in page
    assert "in 12 of 18 rounds" in page
    assert not list(sweep.glob(".*partial"))


def test_curves_have_one_panel_per_setting_and_one_line_per_strategy(sweep):
    figure = curves.draw(read_rounds(sweep)[0], "accuracy", "s")
    assert [axis.get_title() for axis in figure.axes] == ["ratio = 1", "ratio = 20"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["margin", "random"]
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([0.2, 0.3, 0.7])


def test_curves_leave_out_unfinished_runs_where_the_cell_has_finished_ones(sweep):
    add_run(sweep, "margin", 2, (0.9, 0.9), imbalance={"kind": "step", "ratio": 1})
    add_run(sweep, "bait", 2, (0.5, 0.7), imbalance={"kind": "step", "ratio": 1})
    figure = curves.draw(read_rounds(sweep)[0], "accuracy", "s")
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["margin"] == pytest.approx([0.2, 0.3, 0.7])
    assert lines["bait"] == pytest.approx([0.5, 0.7])


def test_legend_marks_strategies_without_a_finished_run_and_the_title_counts_the_drawn_seeds(sweep):
    ratios = [{"imbalance": {"kind": "step", "ratio": ratio}} for ratio in (1, 20)]
    for ratio in ratios:
        add_run(sweep, "bait", 0, (0.5, 0.7), **ratio)
    add_run(sweep, "entropy", 0, (0.5, 0.7), **ratios[0])
    add_run(sweep, "entropy", 0, **ratios[1])
    add_run(sweep, "margin", 5, (0.5,), **ratios[0])
    figure = curves.draw(read_rounds(sweep)[0], "accuracy", "s")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["bait (unfinished)", "entropy (unfinished in some panels)", "margin", "random"]
    assert "mean over 1 to 2 seeds" in figure.get_suptitle()


def test_seeds_in_the_title_are_those_of_the_drawn_points(tmp_path, monkeypatch):
    folder = make_sweep(tmp_path / "s", ["imbalance.ratio"])
    for ratio, seeds in ((1, 2), (20, 3)):
        for seed in range(seeds):
            add_run(folder, "bait", seed, (0.5,) * (1 + seed), imbalance={"kind": "step", "ratio": ratio})
    monkeypatch.setattr(curves, "MAX_PANELS", 1)
    figure = curves.draw(read_rounds(folder)[0], "accuracy", "s")
    assert "mean over 1 to 2 seeds" in figure.get_suptitle()


def test_ticks_of_the_axis_of_labels_are_integers():
    table = make_picture_table({"margin": "margin"})
    for labels in ([10, 20, 30], [5, 15], [100, 150, 200, 250], [1, 2]):
        rows = table.iloc[: len(labels)] if len(labels) < 4 else pd.concat([table, table.iloc[:1]])
        figure = curves.draw(rows.assign(labels=labels, round=range(len(labels))), "accuracy", "s")
        assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def make_picture_table(strategies, panels=1):
    """Return a table of runs of these strategies (label -> name)."""
    rows = [
        {"run": f"{label}-{panel}", "strategy_name": name, "strategy": label, "panel": panel, "seed": 0}
        | {"finished": True, "round": i, "labels": 10 * i, "accuracy": 0.1 * i}
        for label, name in strategies.items()
        for panel in range(panels)
        for i in range(3)
    ]
    return pd.DataFrame(rows)


def test_every_strategy_has_its_own_style_in_all_pictures():
    names = [path.stem for path in Path(fishermask.__file__).parent.glob("query_strategies/[a-z]*.py")]
    assert len(names) == 8
    labels = {name: name for name in names} | {"bait(damping=2.0)": "bait", "mine": "mine", "yours": "yours"}
    styles = curves.strategy_styles(make_picture_table(labels))
    assert len({tuple(style.values()) for style in styles.values()}) == len(labels)
    for part in ("color", "marker"):
        assert len({styles[name][part] for name in names}) == 8
    assert styles["random"] == {"color": "#7F7F7F", "marker": ".", "linestyle": "--"}
    labels_of_few = {name: labels[name] for name in ("bait", "margin", "random")}
    assert curves.strategy_styles(make_picture_table(labels_of_few)) == {name: styles[name] for name in labels_of_few}
    assert len({tuple(curves.style(number).values()) for number in range(77)}) == 77


@pytest.mark.parametrize("panels", [1, 2, 4])
def test_legend_and_titles_stay_within_the_picture(panels, monkeypatch):
    monkeypatch.setattr(curves, "MAX_PANELS", 3)
    long = "fisher_mask(body_size=1024,fisher_samples=1024,damping=1.0,top_classes=10,oversample=2.0)"
    labels = {long: "fisher_mask"} | {name: name for name in (*curves.NAMES[1:], "random", "mine")}
    figure = curves.draw(make_picture_table(labels, panels), "accuracy", "s" * 100)
    figure.draw_without_rendering()
    assert len(figure.axes) == min(panels, curves.MAX_PANELS)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(labels)
    assert long in [text.get_text().replace("\n", "") for text in legend.get_texts()]
    renderer = figure.canvas.get_renderer()
    texts = [figure._suptitle, *(axis.title for axis in figure.axes), legend]
    for box in (text.get_window_extent(renderer) for text in texts):
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.width
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.height


def test_incomplete_last_line_is_ignored_and_overwritten(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(parse(ExperimentConfig, {}), {}, "p.csv")
    folder.append(make_result(0, 0.2))
    with folder.rounds.open("a") as file:
        file.write(json.dumps(make_result(1, 0.3))[:40])
    assert [r["round"] for r in folder.history()] == [0]
    folder.append(make_result(1, 0.4))
    assert [r["accuracy"] for r in folder.history()] == [0.2, 0.4]


def test_damaged_rounds_file_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(parse(ExperimentConfig, {}), {}, "p.csv")
    line = json.dumps(make_result(0, 0.2)) + "\n"
    for content in (
        '{"round": 0\n',
        line + line,
        line + '{"round": 1}\n',
        "[1]\n",
        line.replace('"round": 0', '"round": 1'),
    ):
        folder.rounds.write_text(content)
        with pytest.raises(InputError, match="rounds.jsonl: is damaged"):
            folder.history()
    folder.rounds.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="rounds.jsonl: is damaged"):
        folder.history()


def test_run_with_rounds_refuses_another_pool(tmp_path):
    folder = RunFolder(tmp_path / "run")
    pools = [write_pool(tmp_path, [(name, "cat")]) for name in "ab"]
    for pool in pools:
        folder.create(parse(ExperimentConfig, {}), {}, pool)
    folder.append(make_result(0, 0.2))
    folder.create(parse(ExperimentConfig, {}), {}, pools[1])
    with pytest.raises(InputError, match=f"data: the pool differs from pools/{pools[1]}"):
        folder.create(parse(ExperimentConfig, {}), {}, pools[0])


def test_sweep_folder_is_locked_by_one_process(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match="another process is writing to"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_damaged_sweep_file_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(InputError, match="config.yaml: is damaged"):
        read_rounds(tmp_path)


def test_terminal_table_leaves_out_settings_with_one_value(tmp_path):
    folder = make_sweep(tmp_path / "s", ["data.name", "model.name"])
    for model in ("mlp", "small_cnn"):
        for strategy in ("margin", "random"):
            add_run(folder, strategy, model=model)
    header, rows = report.format_brief_summary(report.write(folder).summary)
    assert header == ["model.name", "strategy", "seeds", "final", "mean", "gain", "gain > 0"]
    assert rows[0] == ["mlp", "margin", "1", "0.300", "0.250", "+0.000", "0 of 1"]


def test_file_of_a_user_named_random_is_not_the_baseline(tmp_path):
    folder = make_sweep(tmp_path / "s")
    add_run(folder, "./random.py", accuracies=(0.2, 0.2, 0.8))
    add_run(folder, "random", accuracies=(0.2, 0.2, 0.4))
    summary = read_summary(folder)
    assert summary["final_accuracy"].to_dict() == {"./random.py": 0.8, "random": 0.4}
    assert summary.loc["./random.py", "gain"] == pytest.approx(0.1)


def test_strategies_are_labeled_by_name_unless_there_are_variants():
    variants = [
        ("bait", {"damping": 1.0}),
        ("bait", {"damping": 2.0}),
        ("fisher_mask", {"fraction": 0.1}),
        ("random", {}),
    ]
    strategies = [StrategyConfig(name=name, params=params) for name, params in variants]
    assert list(display_labels(strategies).values()) == [
        "bait(damping=1.0)",
        "bait(damping=2.0)",
        "fisher_mask",
        "random",
    ]


def test_equal_pools_share_a_file_with_ids_and_classes(tmp_path):
    images = [("train/1.png", "Ankle boot"), ("x,y", "cat")]
    names = [write_pool(tmp_path, pool) for pool in (images, iter(images), images[:1])]
    assert names[0] == names[1] != names[2]
    assert sorted(path.name for path in (tmp_path / "pools").iterdir()) == sorted(set(names))
    table = pd.read_csv(tmp_path / "pools" / names[0])
    assert table.to_dict("list") == {"id": ["train/1.png", "x,y"], "class": ["Ankle boot", "cat"]}


def test_atomic_write_replaces_a_file_and_leaves_no_partial_file(tmp_path):
    file = tmp_path / "a"
    file.write_text("old")
    write_atomically(file, "new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_unwritable_output_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file/results", "/proc/fishermask"):
        with pytest.raises(InputError, match="output: cannot write to .*; choose another with output=DIR"):
            make_folder(tmp_path / folder)


def test_journal_returns_the_entries_of_a_query_and_is_removed_with_its_round(tmp_path):
    folder = RunFolder(tmp_path)
    journal = folder.journal
    assert journal.read(0) == []
    journal.append(0, [["a", 3], ["b", 1]])
    journal.append(0, [["c", 2]])
    journal.append(1, [["d", 9]])
    assert journal.read(0) == [["a", 3], ["b", 1], ["c", 2]]
    assert journal.read(1) == [["d", 9]]
    assert journal.read(2) == []
    folder.append(make_result(0, 0.5))
    assert not journal.path.exists()
    journal.append(1, [["e", 0]])
    assert RunFolder(tmp_path).journal.read(1) == [["e", 0]]


def test_truncated_journal_continues_after_its_last_complete_line(tmp_path):
    journal = JournalFile(tmp_path / "journal.jsonl")
    journal.append(4, [["a", 1]])
    journal.append(4, [["b", 2]])
    content = journal.path.read_bytes()
    for size in range(len(content)):
        journal.path.write_bytes(content[:size])
        entries = JournalFile(journal.path).read(4)
        assert entries == [["a", 1], ["b", 2]][: content[:size].count(b"\n")]
        reopened_journal = JournalFile(journal.path)
        reopened_journal.append(4, [["x", 0]])
        assert reopened_journal.read(4) == [*entries, ["x", 0]]


def test_late_writer_neither_shifts_nor_repeats_journal_entries(tmp_path):
    """Both writers have the same picks, because picks are deterministic."""
    first, second = (JournalFile(tmp_path / "journal.jsonl") for _ in range(2))
    first.append(0, [["a", 1], ["b", 1]])
    assert second.read(0) == [["a", 1], ["b", 1]]
    second.append(0, [["c", 1], ["d", 1]])
    first.append(0, [["c", 1]])
    second.append(0, [["e", 1]])
    assert second.read(0) == [[name, 1] for name in "abcde"]


def test_journal_entries_after_a_gap_are_ignored(tmp_path):
    """The file was removed between two picks."""
    journal = JournalFile(tmp_path / "journal.jsonl")
    journal.append(0, [["a", 1]])
    journal.path.unlink()
    journal.append(0, [["b", 1]])
    assert journal.read(0) == []


def test_damaged_journal_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    for content in ("x\n", "[]\n", '{"round": 0}\n'):
        path.write_text(content)
        with pytest.raises(InputError, match="journal.jsonl: is damaged; remove it"):
            JournalFile(path).read(0)
