"""Files that survive a kill, and tables and pictures made of them."""

import json

import pandas as pd
import pytest
import yaml

from fishermask.config import ExperimentConfig, StrategyConfig, parse
from fishermask.errors import InputError
from fishermask.results import report
from fishermask.results.files import JournalFile, RunFolder, locked, make_folder, write_atomically
from fishermask.results.tables import collect, short_labels, summarize
from fishermask.sweeps.eta import StageTimer, time_left


def result(index, accuracy, labels=None):
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


def make_sweep(folder, finals, rounds=2):
    """finals: (strategy, ratio, seed) -> accuracy in round 1; round 0 is 0.2 for all."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "s", "grid": {"imbalance.ratio": [], "seed": []}}))
    for (strategy, ratio, seed), accuracy in finals.items():
        settings = {"strategy": strategy, "imbalance": {"kind": "step", "ratio": ratio}, "seed": seed}
        run = RunFolder(folder / "runs" / f"{strategy}-{ratio}-{seed}")
        run.create(parse(ExperimentConfig, settings), [("a", "cat", True)])
        for index, value in enumerate([0.2, accuracy][:rounds]):
            run.append(result(index, value))
    return folder


FINALS = {
    ("margin", 1, 0): 0.6, ("margin", 1, 1): 0.8, ("random", 1, 0): 0.4, ("random", 1, 1): 0.9,
    ("margin", 20, 0): 0.5, ("random", 20, 0): 0.4,
}  # fmt: skip


def test_a_table_has_a_row_a_round_and_a_column_for_each_setting_that_varies(tmp_path):
    table = collect(make_sweep(tmp_path / "s", FINALS))
    assert len(table) == 2 * len(FINALS)
    assert list(table.columns[:4]) == ["run", "strategy", "imbalance.ratio", "seed"]
    assert {"labels", "accuracy", "recall.cat", "batch_classes.cat", "seconds.query", "ended_by"} <= set(table.columns)
    row = table[(table["run"] == "margin-1-1") & (table["round"] == 1)].iloc[0]
    assert (row["accuracy"], row["seed"], row["labels"], row["imbalance.ratio"]) == (0.8, 1, 20, 1.0)


def test_the_summary_pairs_each_strategy_with_random_of_the_same_seed(tmp_path):
    summary = summarize(collect(make_sweep(tmp_path / "s", FINALS))).set_index(["imbalance.ratio", "strategy"])
    margin = summary.loc[(1.0, "margin")]
    # Balanced accuracy over the rounds: margin (.2 .25) for seeds 0 and 1, random (.15 .275).
    assert margin["balanced_accuracy_curve"] == pytest.approx(0.225)
    assert margin["gain"] == pytest.approx((0.05 - 0.025) / 2)
    assert margin["gain_sd"] == pytest.approx(0.075 / 2**0.5)
    assert (margin["wins"], margin["pairs"], margin["runs"]) == (1, 2, 2)
    assert margin["accuracy_final"] == pytest.approx(0.7)
    assert pd.isna(summary.loc[(20.0, "margin")]["gain_sd"])


def test_unfinished_runs_are_not_compared_with_finished_ones(tmp_path):
    folder = make_sweep(tmp_path / "s", {("margin", 1, 0): 0.9})
    make = RunFolder(folder / "runs/random-1-0")
    make.create(parse(ExperimentConfig, {"strategy": "random", "imbalance": {"kind": "step", "ratio": 1}}), [])
    make.append(result(0, 0.2))
    summary = summarize(collect(folder)).set_index("strategy")
    assert summary.loc["margin", "pairs"] == 0


def test_a_report_writes_tables_a_picture_and_a_page(tmp_path):
    folder = make_sweep(tmp_path / "s", FINALS)
    report.write(folder)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "results.parquet"), collect(folder))
    assert len(pd.read_csv(folder / "results.csv")) == 2 * len(FINALS)
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (folder / "summary.md").read_text()
    assert "smoke test" in page
    assert "0.700±0.141" in page
    assert "1 of 2" in page
    assert "in 6 of 12 rounds" in page
    assert not list(folder.glob(".*partial"))


def test_curves_have_one_panel_a_setting_and_one_line_a_strategy(tmp_path):
    from fishermask.results.curves import draw

    figure = draw(collect(make_sweep(tmp_path / "s", FINALS)), "accuracy", "s")
    assert [axis.get_title() for axis in figure.axes] == ["ratio = 1", "ratio = 20"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["margin", "random"]
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([0.2, 0.7])


def test_a_round_that_a_kill_cut_short_does_not_count_and_is_overwritten(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(parse(ExperimentConfig, {}), [])
    folder.append(result(0, 0.2))
    with folder.rounds.open("a") as file:
        file.write(json.dumps(result(1, 0.3))[:40])
    assert [r["round"] for r in folder.history()] == [0]
    folder.append(result(1, 0.4))
    assert [r["accuracy"] for r in folder.history()] == [0.2, 0.4]


def test_a_damaged_file_is_an_error_not_a_shorter_history(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(parse(ExperimentConfig, {}), [])
    good = json.dumps(result(0, 0.2)) + "\n"
    for damage in (
        '{"round": 0\n',
        good + good,
        good + '{"round": 1}\n',
        "[1]\n",
        good.replace('"round": 0', '"round": 1'),
    ):
        folder.rounds.write_text(damage)
        with pytest.raises(InputError, match="rounds.jsonl: is damaged"):
            folder.history()
    folder.rounds.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="rounds.jsonl: is damaged"):
        folder.history()


def test_a_run_does_not_go_on_with_other_images_than_it_began_with(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(parse(ExperimentConfig, {}), [("a", "cat", True)])
    folder.create(parse(ExperimentConfig, {}), [("b", "cat", True)])
    folder.append(result(0, 0.2))
    with pytest.raises(InputError, match="its images are not those that .* was begun with"):
        folder.create(parse(ExperimentConfig, {}), [("a", "cat", True)])


def test_one_process_at_a_time_writes_to_a_sweep(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match="another process is writing to"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_damaged_sweep_file_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(InputError, match="config.yaml: is damaged"):
        collect(tmp_path)


def test_strategies_go_by_name_where_one_variant_was_run(tmp_path):
    variants = [
        ("bait", {"damping": 1.0}),
        ("bait", {"damping": 2.0}),
        ("fisher_mask", {"fraction": 0.1}),
        ("random", {}),
    ]
    strategies = [StrategyConfig(name=name, params=params) for name, params in variants]
    assert list(short_labels(strategies).values()) == [
        "bait(damping=1.0)",
        "bait(damping=2.0)",
        "fisher_mask",
        "random",
    ]


def test_the_pool_of_a_run_is_written_with_ids_and_classes(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(parse(ExperimentConfig, {"seed": 3}), [("train/1.png", "Ankle boot", True), ("x,y", "cat", False)])
    table = pd.read_csv(folder.path / "pool.csv")
    assert table.to_dict("list") == {"id": ["train/1.png", "x,y"], "class": ["Ankle boot", "cat"], "initial": [1, 0]}
    assert folder.config() == parse(ExperimentConfig, {"seed": 3})


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "a"
    file.write_text("old")
    write_atomically(file, "new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file/results", "/proc/fishermask"):
        with pytest.raises(InputError, match="output: cannot write to .*; choose another with output=DIR"):
            make_folder(tmp_path / place)


def test_a_journal_gives_the_rounds_entries_back_and_ends_with_the_round(tmp_path):
    folder = RunFolder(tmp_path)
    journal = folder.journal
    assert journal.read(0) == []
    journal.append(0, [["a", 3], ["b", 1]])
    journal.append(0, [["c", 2]])
    journal.append(1, [["d", 9]])
    assert journal.read(0) == [["a", 3], ["b", 1], ["c", 2]]
    assert journal.read(1) == [["d", 9]]
    assert journal.read(2) == []
    folder.append(result(0, 0.5))
    assert not journal.path.exists()
    journal.append(1, [["e", 0]])
    assert RunFolder(tmp_path).journal.read(1) == [["e", 0]]


def test_a_journal_that_a_kill_cut_short_goes_on_after_its_last_whole_line(tmp_path):
    journal = JournalFile(tmp_path / "journal.jsonl")
    journal.append(4, [["a", 1]])
    journal.append(4, [["b", 2]])
    whole = journal.path.read_bytes()
    for cut in range(len(whole)):
        journal.path.write_bytes(whole[:cut])
        entries = JournalFile(journal.path).read(4)
        assert entries == [["a", 1], ["b", 2]][: whole[:cut].count(b"\n")]
        again = JournalFile(journal.path)
        again.append(4, [["x", 0]])
        assert again.read(4) == [*entries, ["x", 0]]


def test_a_late_writer_neither_shifts_nor_repeats_what_another_wrote(tmp_path):
    """Picks do not depend on who makes them: both writers have the same."""
    late, current = (JournalFile(tmp_path / "journal.jsonl") for _ in range(2))
    late.append(0, [["a", 1], ["b", 1]])
    assert current.read(0) == [["a", 1], ["b", 1]]
    current.append(0, [["c", 1], ["d", 1]])
    late.append(0, [["c", 1]])
    current.append(0, [["e", 1]])
    assert current.read(0) == [[name, 1] for name in "abcde"]


def test_a_gap_in_a_journal_ends_it(tmp_path):
    """The file went between two picks: what stands after the gap is of no use."""
    journal = JournalFile(tmp_path / "journal.jsonl")
    journal.append(0, [["a", 1]])
    journal.path.unlink()
    journal.append(0, [["b", 1]])
    assert journal.read(0) == []


def test_a_damaged_journal_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    for content in ("x\n", "[]\n", '{"round": 0}\n'):
        path.write_text(content)
        with pytest.raises(InputError, match="journal.jsonl: is damaged; remove it"):
            JournalFile(path).read(0)


def test_a_stage_says_how_far_it_is_and_when_it_will_be_done():
    stage_timer = StageTimer()
    assert stage_timer.update("a", "train", 0, 1, 0.0) == "train"
    assert stage_timer.update("a", "pick", 0, 100, 10.0) == "pick 0/100"
    assert stage_timer.update("a", "pick", 20, 100, 30.0) == "pick 20/100, ETA 1:20"
    assert stage_timer.update("b", "pick", 20, 100, 30.0) == "pick 20/100"
    assert stage_timer.update("a", "pick", 1, 100, 40.0) == "pick 1/100"  # of the next round
    assert stage_timer.update("a", "pick", 2, 100, 140.0) == "pick 2/100, ETA 2:43:20"


def test_a_runs_last_round_is_known_to_have_no_query():
    """Of three rounds, each 1 s for the model and 9 s for the query, two are done."""
    assert time_left(20.0, [1.0, 1.0], [9.0, 9.0], rounds=1, batches=0) == 1.0
    # Two such runs at once, one of them finished: what took 40 s one after the other took 20.
    assert time_left(20.0, [1.0] * 5, [9.0, 9.0, 9.0, 8.0], rounds=1, batches=0) == pytest.approx(20 / 40)
    assert time_left(10.0, [2.0], [8.0], rounds=3, batches=2) == 3 * 2 + 2 * 8
    assert time_left(6.0, [2.0], [], rounds=2, batches=1) == 12.0  # nothing is known of queries yet
    assert time_left(6.0, [2.0], [1.0], rounds=0, batches=0) == 0.0
