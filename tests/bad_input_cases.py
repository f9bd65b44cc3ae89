"""Catalog of bad input: commands, and the words that their one-line errors must contain."""

import datetime
import io
import json
import os
import socket
import struct
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

TINY = {
    "name": "tiny",
    "base": {
        "imbalance": {"kind": "balanced", "per_class": 30},
        "model": {"name": "mlp", "params": {"width": 8, "depth": 1}},
        "budget": {"initial": 10, "query": 10, "total": 30},
        "training": {"max_epochs": 1},
        "strategy": "random",
    },
    "grid": {"seed": [0]},
}
SMALL_BUDGET = ["imbalance={kind: balanced}", "budget={initial: 1, query: 1, total: 2}"]
CASES: dict[str, dict] = {}


def case(name, argv, *words, files=None, env=None, lines=1):
    """Add a command, and the words that its error must contain.

    Args:
        files: name -> content, or a function that creates the file at a path; ``tiny.yaml`` always exists.
        lines: number of lines on stderr: one for each independent mistake.
    """
    assert name not in CASES, name
    CASES[name] = {
        "argv": argv, "words": words, "files": files or {}, "env": env or {}, "lines": lines,
    }  # fmt: skip


def dry(*settings, file="tiny.yaml"):
    return ["sweep", file, "--dry-run", *settings]


# ---- Settings: key -> invalid values. --------------------------------------------------------------------------

HUGE = str(10**20)
ENDLESS = "1" + "0" * 400
NO_COUNT = ["-1", "0", "1.5", "true", "many", ".nan", "[1]", "{a: 1}", HUGE, "2024-01-01", "''"]
NO_NUMBER = ["-1", ".nan", ".inf", "-.inf", "true", "much", "[1]", "{a: 1}", ENDLESS, "''", "null"]
NO_FLAG = ["1", "'yes'", "maybe", "[true]", "0.0"]
LETTERS = "x" * 300

WRONG_VALUES = {
    "seed": ["-1", "1.5", "true", "many", ".nan", "[[1]]", "{a: 1}", HUGE, ENDLESS, str(2**63), "null", "2024-13-45"],
    "training.batch_size": [*NO_COUNT, "null"],
    "training.max_epochs": [*NO_COUNT, "null"],
    "budget.initial": [*NO_COUNT, "null", "301"],
    "budget.query": [*NO_COUNT, "null", "301"],
    "budget.total": [*NO_COUNT, "null", "301"],
    "imbalance.per_class": [*NO_COUNT],
    "data.image_size": [*NO_COUNT, "3", "100000"],
    "resources.restarts": ["-1", "1.5", "true", "many", HUGE, "null"],
    "resources.shards": [*NO_COUNT, "null", "10001", "301"],
    "training.learning_rate": [*NO_NUMBER, "0"],
    "training.target_accuracy": [*NO_NUMBER, "0", "1.1", "100"],
    "training.clip": [value for value in NO_NUMBER if value != "null"] + ["0"],
    "engine.drift": [*NO_NUMBER, "0"],
    "resources.cpus": [*NO_NUMBER, "0", "1e-5", "5000"],
    "resources.cpus_per_shard": [*NO_NUMBER, "0", "5000"],
    "resources.gpus": [*NO_NUMBER, "5000"],
    "resources.gpus_per_shard": [*NO_NUMBER, "5000"],
    "resources.memory": [value for value in NO_NUMBER if value != "null"] + ["0", "1e7"],
    "data.download": [*NO_FLAG, "null"],
    "data.augment": NO_FLAG,
    "engine.channels_last": [*NO_FLAG, "null"],
    "engine.storage": ["float64", "5", "null", "''"],
    "engine.scores": ["float16", "[float32]"],
    "engine.gradients": ["float16", "{}"],
    "resources.workers": ["threads", "null", "1"],
    "data.statistics": ["mine", "null", "[0.5]"],
    "data.channels": ["3", "RGB", "null", "[gray]"],
    "data.name": ["coco", "5", "null", "''", "[a]", LETTERS, '"a\\0b"', '"a\\nb"'],
    "data.label_column": ["5", "''", "null", f"'{LETTERS}'"],
    "data.image_column": ["5", "''"],
    "model": ["vgg", "5", "null", "''", "[]", "{}", "{params: {}}", LETTERS, "{name: mlp, width: 3}", "{name: 5}"],
    "strategy": ["best", "5", "null", "''", "[]", "{}", LETTERS, "..", "{name: margin, x: 1}", "{name: ../margin}"],
    "strategy.label": ["5", "''", "..", f"'{LETTERS}'", '"a\\nb"', "a/b", "[a]"],
    "imbalance": ["5", "null", "{}", "step", "stop", "NONE", "[none]", "{kind: stop}", "{kind: null}", "[step]", "{kind: step}"],
    "imbalance.kind": ["stop", "5", "[step]"],
    "imbalance.per_clas": ["1"],
    "data.root": ["5", "''", "'~nosuchuser'", '"a\\0b"', f"'{LETTERS}'"],
    "budget": ["5", "[1, 2, 3]", "null", "{initial: 20, total: 10}", "{totl: 3}"],
    "training": ["5", "{epochs: 3}", "fast"],
    "data": ["5", "[a]", "null", "coco"],
    "resources": ["5", "{cpu: 1}"],
    "engine": ["5", "{type: float32}", "[]"],
    "sed": ["1"],
    "grid.sed": ["[1]"],
    "grid.seed.x": ["[1]"],
    "grid.seed": ["[]", "5", "null", "{a: 1}", "[1, 1]", "[a]", "[true]", "[[1]]"],
    "grid.budget.query": ["[]", "[0]", "[-1, 5]", "[5, 5]"],
    "model.params.width": ["0", "-5", "1.5", "true", "wide", "null", "[8]", ".nan", "1000000000000", HUGE, "10000000000"],
    "model.params.depth": ["0", "-1", "1.5", HUGE, "100000"],
    "model.params.breadth": ["3", "null"],
    "base": ["{}", "5", "{seed: 1}"],
    "grid": ["{}", "5"],
    "name": ["", "a/b", "../x", ".", "-x", LETTERS, "a b", "näme", "a\x00b".replace("\x00", "\n"), "x" * 101],
    "output": ["", "  ", "~nosuchuser/x", "a\nb", LETTERS, "a/" * 3000, "tiny.yaml", "/dev/null", "/dev/null/x", "/proc/x"],
    "description": ["a\x01b"],
}  # fmt: skip
NAMES = {  # where the message does not contain the key itself
    ("budget", "{initial: 20, total: 10}"): "budget: ", ("grid.sed", "[1]"): "sed: ",
    ("model", "vgg"): "model.name", ("imbalance.kind", "[step]"): "imbalance",
    ("grid.budget.query", "[-1, 5]"): "budget.query", ("grid.seed", "[a]"): "seed", ("grid.seed", "[true]"): "seed",
    ("grid.seed", "[[1]]"): "seed", ("grid.seed", "[1, 1]"): "twice in the grid",
    ("budget.initial", "301"): "total 30 is below initial 301",
    ("model.params.width", "1000000000000"): "model.params.width", ("grid.budget.query", "[0]"): "budget.query", ("grid.budget.query", "[5, 5]"): "twice in the grid",
}  # fmt: skip
for key, values in WRONG_VALUES.items():
    for value in values:
        shown = value if len(value) <= 30 else f"{value[:20]}...({len(value)})"
        case(f"{key}={shown}", dry(f"{key}={value}"), NAMES.get((key, value), key))

# ---- Imbalance and strategy parameters. -------------------------------------------------------------------------------

for setting, value in {
    "imbalance.ratio": ("{kind: step, ratio: 0.5}", "{kind: step, ratio: .inf}", "{kind: step, ratio: 1e300}", "{kind: long_tail, ratio: true}", "{kind: step, ratio: 10000}"),
    "imbalance.rare": ("{kind: step, ratio: 2, rare: 10}", "{kind: step, ratio: 2, rare: 0}"),
    "imbalance.rare_classes": ("{kind: step, ratio: 2, rare_classes: [10]}", "{kind: step, ratio: 2, rare_classes: [-1]}", "{kind: step, ratio: 2, rare_classes: [1, 1]}", "{kind: step, ratio: 2, rare_classes: []}"),
    "imbalance.order": ("{kind: long_tail, ratio: 2, order: [0, 1]}", "{kind: long_tail, ratio: 2, order: [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]}", "{kind: long_tail, ratio: 2, order: 5}"),
    "imbalance.counts": ("{kind: counts, counts: {}}", "{kind: counts, counts: {0: 5}}", "{kind: counts, counts: {0: 5, 10: 5}}", "{kind: counts, counts: {0: 0, 1: 5}}", "{kind: counts, counts: {a: 3, 1: 5}}", "{kind: counts, counts: {-1: 3, 1: 5}}", "{kind: counts, counts: [1, 2]}"),
    "imbalance.counts: class 1": ("{kind: counts, counts: {0: 5, 1: 5000}}", "{kind: counts, counts: {0: 5, 1: 100000000}}"),
}.items():  # fmt: skip
    for text in value:
        case(f"imbalance={text}", dry(f"imbalance={text}"), setting)

for strategy, params in {
    "fisher_mask": ["num_body_parameters: -1", "num_body_parameters: 1.5", "fraction: 0", "fraction: 2", "fraction: .nan", "fraction: 1e-9", "damping: 0", "damping: -1", "mask: best", "preset: [a]", "preset: other", "preset: 5", "fisher_samples: 0", "fisher_samples: 1.5", "top_classes: 1", "top_classes: 10, fraction: 0.5", f"top_classes: {HUGE}, fraction: 0.5", "oversample: 0.5", "oversample: .inf", "target: all", "class_weighting: 3", "lambda: 1", "initial_information: 1"],
    "bait": ["damping: 0", "damping: .inf", "fraction: 0.1", "top_classes: 2.5"],
    "margin": ["x: 1"], "random": ["seed: 1"], "entropy": ["5: 1"], "coreset": ["x: .nan"], "badge": ["k: 3"],
}.items():  # fmt: skip
    for text in params:
        name = text.split(":")[0]
        argument = f"strategy={{name: {strategy}, params: {{{text}}}}}"
        case(f"{strategy}: {text}", dry(argument), f"strategy.params.{name}")
case("data.train without its source", dry("data.train=x.parquet"), "data.train: not used by fashion_mnist_small")
case("the number of rare classes, and others", dry("imbalance={kind: step, ratio: 2, rare: 2, rare_classes: [0]}"),
     "imbalance.rare: 2, but imbalance.rare_classes lists 1")  # fmt: skip
case("a model that no memory holds", dry("model.params.width=900000000"), "model.params", "GB of memory are free")
case("two settings of the mask's size", dry("strategy={name: fisher_mask, params: {num_body_parameters: 8, fraction: 0.5}}"),
     "strategy.params: fraction and num_body_parameters")  # fmt: skip
case("strategy.params=5", dry("strategy={name: margin, params: 5}"), "strategy.params")
case("strategy.params=[1]", dry("strategy={name: margin, params: [1]}"), "strategy.params")
case("model.params=text", dry("model={name: mlp, params: wide}"), "model.params")
case("NaN deep in model.params", dry("model={name: a:b, params: {x: [{y: .nan}]}}"), "model.params.x")
case("model.params with numbers as keys", dry("model={name: mlp, params: {1: 2}}"), "model.params")
case("two mistakes are two lines", dry("seed=-1", "budget.query=0"), "seed", "budget.query", lines=2)
case("a grid of 10^10 runs", dry(*(f"grid.{key}=[{','.join(f'{n}.{d}' for d in range(10))}]" for n, key in enumerate(
    ["training.learning_rate", "training.clip", "training.target_accuracy", "resources.cpus", "resources.memory",
     "engine.drift", "imbalance.ratio", "resources.gpus", "resources.cpus_per_shard", "resources.gpus_per_shard"])),
    "seed=0"), "grid", "10,000,000,000 runs")  # fmt: skip
case("a run with a name of 300 letters", dry(f"grid.data.label_column=['{LETTERS[:199]}']"), "grid")
case("published statistics that are not there", dry("data={name: parquet, train: data.parquet, test: test.parquet, statistics: published}", *SMALL_BUDGET),
     "data.statistics", files=dict.fromkeys(("data.parquet", "test.parquet"), lambda path: write_parquet(path)))  # fmt: skip

# ---- YAML files. ------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {k: 1, l: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)
)
YAML_FILES = {
    "empty": (b"", "expected the keys"),
    "only a comment": (b"# nothing\n", "expected the keys"),
    "a list": (b"[1, 2]", "expected the keys"),
    "a word": (b"hello", "expected the keys"),
    "a number": (b"5", "expected the keys"),
    "not closed": (b"a: [", "is not YAML"),
    "a tab": (b"name: x\nbase:\n\tseed: 1\n", "is not YAML"),
    "two documents": (b"name: x\n---\nname: y\n", "is not YAML"),
    "Latin-1": ("name: x\ndescription: grün\n".encode("latin-1"), "is not YAML"),
    "UTF-16 cut short": ("name: x".encode("utf-16")[:-1], "is not YAML"),
    "binary": (bytes(range(256)), "is not YAML"),
    "NUL": (b"name: x\0", "is not YAML"),
    "NUL as an escape": (b'name: x\nbase: {data: {train: "a\\0b"}}', "data.train"),
    "half of a surrogate pair": (b'name: x\nbase: {data: {train: "\\ud800"}}', "data.train"),
    "a line break in a key": (b'name: x\n"ba\\nse": 1', "line 2"),
    "a repeated key": (b"name: x\nbase: {}\nbase: {}\n", "base appears twice"),
    "a repeated key in another notation": (b"name: x\nbase: {imbalance: {counts: {1: 2, 0x1: 3}}}", "1 appears twice"),
    "a repeated inner key": (b"name: x\nbase: {seed: 1, seed: 2}\n", "seed appears twice"),
    "a list as a key": (b"name: x\n? [a]\n: 1\n", "neither text nor an integer"),
    "a mapping as a key": (b"name: x\n? {a: 1}\n: 1\n", "neither text nor an integer"),
    "null as a key": (b"name: x\n~: 1\n", "neither text nor an integer"),
    "an unknown key": (b"name: x\nbas: {}\n", "bas: unknown key"),
    "no name": (b"base: {}\n", "name: missing"),
    "a name that is a number": (b"name: 5\n", "name"),
    "a name that YAML takes for false": (b"name: no\n", "name"),
    "base is a list": (b"name: x\nbase: [1]\n", "base"),
    "base is null": (b"name: x\nbase:\n", "base"),
    "grid is a list": (b"name: x\ngrid: [1]\n", "grid"),
    "grid is null": (b"name: x\ngrid:\n", "grid"),
    "grid of text": (b"name: x\ngrid: {seed: abc}\n", "grid.seed"),
    "grid with a number as a key": (b"name: x\ngrid: {5: [1]}\n", "grid.5"),
    "output is a number": (b"name: x\noutput: 5\n", "output"),
    "output is empty": (b"name: x\noutput: ''\n", "output"),
    "month 13": (b"name: x\nbase: {seed: 2024-13-01}\n", "seed"),
    "a date": (b"name: x\nbase: {seed: 2024-01-01}\n", "seed"),
    "!!timestamp": (b"name: x\nbase: {seed: !!timestamp 2024-13-01}\n", "base.seed"),
    "!!int abc": (b"name: x\nbase: {seed: !!int abc}\n", "base.seed"),
    "!!float abc": (b"name: x\nbase: {seed: !!float abc}\n", "base.seed"),
    "!!bool abc": (b"name: x\nbase: {seed: !!bool abc}\n", "base.seed"),
    "!!binary": (b"name: x\nbase: {seed: !!binary gIGC}\n", "base.seed"),
    "!!set": (b"name: x\nbase: {seed: !!set {a, b}}\n", "base.seed"),
    "!!python/object": (b"name: x\nbase: {seed: !!python/object/apply:os.getcwd []}\n", "is not YAML"),
    "!own": (b"name: x\nbase: {seed: !own 5}\n", "is not YAML"),
    "5,000 digits": (b"name: x\nbase: {seed: " + b"9" * 5000 + b"}\n", "base.seed"),
    "5,000 hexadecimal digits": (b"name: x\nbase: {seed: 0x" + b"f" * 5000 + b"}\n", "base.seed"),
    "a cycle of lists": (b"name: x\nbase: &b {seed: [*b]}\n", "contains itself"),
    "a cycle in the grid": (b"name: x\ngrid: {seed: &s [*s]}\n", "contains itself"),
    "a cycle at the top": (b"&a [*a]", "contains itself"),
    "an anchor that is not there": (b"name: *x\n", "is not YAML"),
    "500 nested keys": (b"name: x\nbase: " + b"{a: " * 500 + b"1" + b"}" * 500, "nested"),
    "5,000 nested lists": (b"name: x\nbase: " + b"[" * 5000 + b"]" * 5000, "nested"),
    "100 nested keys": (b"name: x\nbase: " + b"{a: " * 100 + b"1" + b"}" * 100, "nested more than 32"),
    "anchors that expand to 10^12 values": (LAUGHS.encode() + b"name: x\n", "more than 100,000 values"),
    "merges that expand to 10^12 values": (MERGES.encode() + b"name: x\n", "more than 100,000 values"),
    "2 MB": (b"name: x\n# " + b"x" * 2_000_000, "the limit is 1,000,000"),
    "NaN in the parameters": (b"name: x\nbase: {model: {name: mlp, params: {width: .nan}}}", "model.params"),
}  # fmt: skip
for name, (content, words) in YAML_FILES.items():
    case(f"YAML: {name}", dry(file="case.yaml"), words, files={"case.yaml": content})
for text in ("[1", "{a", "&a [*a]", "!!int abc", "*x", "'", "9" * 5000, "{a: 1, a: 2}", "@", "[" * 500):
    case(f"seed as YAML: {text[:20]}", dry(f"seed={text}"), "seed")

# ---- The command line. ------------------------------------------------------------------------------------------------

for name, argv, words in [
    ("no command", [], "Missing command"),
    ("an unknown command", ["sweeep", "tiny.yaml"], "sweeep"),
    ("no file", ["sweep"], "FILE"),
    ("an empty file name", ["sweep", ""], "FILE"),
    ("a file name with a line break", ["sweep", "a\nb"], "FILE"),
    ("a file name of 5,000 letters", ["sweep", "x" * 5000], "FILE"),
    ("a file name that is no UTF-8", ["sweep", b"\xff.yaml"], "FILE"),
    ("a file that is not there", ["sweep", "none.yaml"], "none.yaml"),
    ("a folder as the file", ["sweep", "."], "is a folder"),
    ("a device as the file", ["sweep", "/dev/zero"], "is a device"),
    ("an empty device as the file", ["sweep", "/dev/null"], "is a device"),
    ("a file below a file", ["sweep", "tiny.yaml/x"], "tiny.yaml/x"),
    ("an unknown option", ["sweep", "tiny.yaml", "--dryrun"], "--dryrun"),
    ("an option of another command", ["run", "tiny.yaml", "--dry-run"], "--dry-run"),
    ("no equals sign", dry("budget.query"), "budget.query"),
    ("no key", dry("=3"), "'=3'"),
    ("a key with a line break", dry("a\nb=3"), "key=value"),
    ("a key of 5,000 letters", dry("x" * 5000 + "=3"), "key=value"),
    ("a key that is no UTF-8", dry(b"\xff=3"), "key=value"),
    ("a value that is no UTF-8", dry(b"data.train=\xff"), "data.train"),
    ("an empty part of a key", dry("budget..query=3"), "budget."),
    ("a key that ends with a point", dry("budget.=3"), "budget."),
    ("a point as a key", dry(".=3"), "'.': expected key=value"),
    ("a key below a number", dry("seed.x=3"), "seed"),
    ("a key below what the grid varies", ["sweep", "grid.yaml", "strategy.params.x=1"], "strategy.params.x"),
    ("a report without a folder", ["report"], "DIR"),
    ("a report of an empty name", ["report", ""], "DIR"),
    ("a report of nothing", ["report", "nowhere"], "nowhere"),
    ("a report of a file", ["report", "tiny.yaml"], "tiny.yaml"),
    ("a report of another folder", ["report", "."], "holds no results"),
    ("an unknown metric", ["report", ".", "--metric", "loss"], "--metric"),
]:  # fmt: skip
    grid = {"grid.yaml": yaml.safe_dump(TINY | {"grid": {"strategy": ["margin"]}}).encode()}
    case(f"command line: {name}", argv, words, files=grid)
for name, make in {
    "a FIFO": os.mkfifo,
    "a broken link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a socket": lambda path: make_socket(path),
    "a folder": lambda path: path.mkdir(),
}.items():
    case(f"the sweep file is {name}", dry(file="case.yaml"), "case.yaml", files={"case.yaml": make})
    source = "data={name: parquet, train: case.parquet, test: case.parquet}"
    if name != "a folder":
        case(f"a data file is {name}", dry(source), "data.train", "case.parquet", files={"case.parquet": make})
    inside = "data={name: parquet, train: folder, test: folder}"
    case(f"a data folder holds {name}", dry(inside), "data.train", "x.parquet", files={"folder/x.parquet": make})
    case(f"the output is {name}", dry("output=case/x"), "output", files={"case": make}) if name != "a folder" else None

# ---- Models: bodies of factories, which can use num_classes, torch and nn. ---------------------------------------------

PRELUDE = """
import os, subprocess, sys, time, warnings
import torch
from torch import nn

class Unprintable(Exception):
    def __str__(self):
        raise KeyError("no text")

class Net(nn.Module):
    def __init__(self, num_classes, out=None, before=None, width=784):
        super().__init__()
        self.linear = nn.Linear(width, num_classes)
        self.out, self.before = out, before
    def forward(self, images):
        if self.before is not None:
            self.before(images)
        logits = self.linear(images.flatten(1))
        return logits if self.out is None else self.out(logits)

def throw(error):
    raise error

def recurse(*_):
    return recurse()

class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, g):
        raise ValueError("no gradient today")
"""
FACTORIES = {
    "raises ValueError": "raise ValueError('boom')",
    "raises KeyError": "raise KeyError('boom')",
    "raises RuntimeError": "raise RuntimeError('boom')",
    "raises OSError": "open('/nowhere/weights.pt')",
    "raises an assertion": "assert False",
    "raises an import error": "import nowhere_at_all",
    "raises a message of many lines": "raise ValueError('a\\nb\\nc')",
    "raises a message of 10^6 letters": "raise ValueError('x' * 10**6)",
    "raises escape sequences": "raise ValueError('\\x1b[31m\\0\\u2028 red')",
    "raises what cannot be printed": "raise Unprintable()",
    "raises a group": "raise ExceptionGroup('several', [ValueError('a'), TypeError('b')])",
    "raises BaseException": "raise BaseException('boom')",
    "raises StopIteration": "raise StopIteration",
    "raises GeneratorExit": "raise GeneratorExit",
    "raises MemoryError": "raise MemoryError",
    "raises UnicodeDecodeError": "b'\\xff'.decode()",
    "exits": "sys.exit()",
    "exits with 3": "sys.exit(3)",
    "exits with a message": "sys.exit('I give up')",
    "raises SystemExit(0)": "raise SystemExit(0)",
    "recurses for ever": "return recurse()",
    "asks for 10^15 bytes": "return nn.Linear(10**15, 1)",
    "prints and raises": "print('hello'); print('oops', file=sys.stderr); raise ValueError('boom')",
    "warns and raises": "warnings.warn('careful'); raise ValueError('boom')",
    "writes to descriptor 2 and raises": "os.write(2, b'from C\\n'); raise ValueError('boom')",
    "lets a process print and raises": "subprocess.run('echo noise >&2', shell=True); raise ValueError('boom')",
    "logs and raises": "import logging; logging.getLogger('x').error('bad'); raise ValueError('boom')",
    "returns None": "return None",
    "returns a number": "return 5",
    "returns a class": "return Net",
    "returns a tuple": "return Net(num_classes), None",
    "returns a function": "return lambda images: images",
    "has no parameters": "return nn.Flatten()",
    "has empty parameters": "m = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)); m[1] = nn.Flatten(); m.p = nn.Parameter(torch.zeros(0)); return m",
    "is frozen": "return Net(num_classes).requires_grad_(False)",
    "has meta parameters": "return Net(num_classes).to('meta')",
    "has a meta buffer": "m = Net(num_classes); m.register_buffer('b', torch.zeros(1, device='meta')); return m",
    "has meta logits": "return Net(num_classes, lambda x: x.to('meta'))",
    "is of float64": "return Net(num_classes).double()",
    "wants other images": "return Net(num_classes, width=3)",
    "wants color": "return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))",
    "has integer logits": "return Net(num_classes, lambda x: x.argsort(-1))",
    "has boolean logits": "return Net(num_classes, lambda x: x > 0)",
    "has complex logits": "return Net(num_classes, lambda x: torch.complex(x, x))",
    "has a class too few": "return Net(num_classes - 1)",
    "has a class too many": "return Net(num_classes + 1)",
    "has logits of 3 dimensions": "return Net(num_classes, lambda x: x[None])",
    "has one row of logits": "return Net(num_classes, lambda x: x.mean(0, keepdim=True))",
    "returns a dictionary of logits": "return Net(num_classes, lambda x: {'logits': x})",
    "returns a list of logits": "return Net(num_classes, list)",
    "returns no logits": "return Net(num_classes, lambda x: None)",
    "returns numpy logits": "return Net(num_classes, lambda x: x.detach().numpy())",
    "has NaN logits": "return Net(num_classes, lambda x: x / 0 * 0)",
    "has NaN logits in eval mode only": "m = Net(num_classes); m.out = lambda x: x if m.training else x * float('nan'); return m",
    "returns probabilities": "return Net(num_classes, lambda x: x.softmax(-1))",
    "has infinite logits in eval mode only": "m = Net(num_classes); m.out = lambda x: x if m.training else x + float('inf'); return m",
    "forward raises ValueError": "return Net(num_classes, before=lambda x: throw(ValueError('boom')))",
    "forward raises TypeError": "return Net(num_classes, before=lambda x: throw(TypeError('boom')))",
    "forward raises IndexError": "return Net(num_classes, before=lambda x: throw(IndexError('boom')))",
    "forward raises AttributeError": "return Net(num_classes, before=lambda x: x.nothing)",
    "forward raises NotImplementedError": "return nn.ModuleList([nn.Linear(784, 10)])",
    "forward raises StopIteration": "return Net(num_classes, before=lambda x: next(iter([])))",
    "forward exits": "return Net(num_classes, before=lambda x: sys.exit(4))",
    "forward recurses for ever": "return Net(num_classes, before=recurse)",
    "forward asks for 10^15 bytes": "return Net(num_classes, before=lambda x: torch.zeros(10**15))",
    "forward raises on real images only": "return Net(num_classes, before=lambda x: throw(ValueError('boom')) if x.any() else None)",
    "forward warns and raises": "return Net(num_classes, before=lambda x: (warnings.warn('slow'), throw(ValueError('boom'))))",
    "eval raises": "m = Net(num_classes); m.eval = lambda: throw(ValueError('boom')); return m",
    "eval returns nothing": "m = Net(num_classes); m.eval = lambda: None; return m",
    "parameters raises": "m = Net(num_classes); m.named_parameters = lambda *a, **k: throw(ValueError('boom')); return m",
    "has sparse logits": "return Net(num_classes, lambda x: x.to_sparse())",
    "has nested logits": "return Net(num_classes, lambda x: torch.nested.nested_tensor(list(x)))",
    "requires_grad_ raises": "m = Net(num_classes); m.requires_grad_ = lambda *_: throw(ValueError('boom')); return m",
    "has no __init__": "m = Net.__new__(Net); return m",
}  # fmt: skip
SIGNATURES = {"takes nothing": "()", "takes other keywords": "(classes)", "takes too much": "(num_classes, depth)"}
MODULES = {
    "has a syntax error": b"def make(:",
    "exits when it is imported": b"import sys\nsys.exit(1)\n",
    "raises when it is imported": b"raise KeyError('boom')\n",
    "imports what is not there": b"import nowhere_at_all\n",
    "is no UTF-8": b"# \xff\n",
    "holds NUL": b"x = 1\0\n",
    "recurses when it is imported": b"def f():\n    return f()\nf()\n",
    "has no factory": b"x = 1\n",
    "has a factory that cannot be called": b"make = 5\n",
}
DETAILS = {
    "has meta logits": "on the device of its images",
    "returns probabilities": " returns probabilities; return logits",
}
for number, name in enumerate(FACTORIES):
    words = ("model.name", f"their_models:f{number}", DETAILS.get(name, ""))
    case(f"a model {name}", dry(f"model=their_models:f{number}"), *words)
for name in SIGNATURES:
    case(f"a factory {name}", dry(f"model=their_models:g_{name.replace(' ', '_')}"), "model.name")
for number, name in enumerate(MODULES):
    case(f"a module {name}", dry(f"model=their_module_{number}:make"), "model.name", f"their_module_{number}")
for name in (":", "a:", ":b", ".a:b", "..a:b", "nowhere:make", "os:path", "os:getcwd", "sys:exit", "torch.nn:Linear", "torch.nn:Nothing", "json:", "a b:c", "os.path:join:x", "builtins:dict"):  # fmt: skip
    case(f"the model {name}", dry(f"model='{name}'"), "model.name")
case("a parameter that the factory does not take", dry("model={name: torch.nn:Flatten, params: {x: 1}}"), "model.name")
# Queries with gradients of the model.
for strategy in ("bait", "fisher_mask"):
    number = len(FACTORIES)
    case(f"{strategy}: the gradient raises", dry(f"model=their_models:f{number}", f"strategy={strategy}"), "model")
case(
    "random: the gradient raises", dry(f"model=their_models:f{number}"), "fails when it is trained (ValueError: no grad"
)
FACTORIES["has a gradient that raises"] = "m = Net(num_classes); m.out = Backward.apply; return m"

# ---- Strategies: contents of files. ----------------------------------------------------------------------------------------------

QUERY = "def query(pool, budget, params):\n    return pool.candidates[:budget]\n"
PARAMS = "from pydantic import Field, model_validator\nfrom fishermask.config import Config\n"
STRATEGIES = {
    "has a syntax error": "def query(:",
    "is empty": "",
    "has no query": "x = 1",
    "has a query that cannot be called": "query = 5",
    "exits when it is imported": "import sys\nsys.exit(5)",
    "raises when it is imported": "raise RuntimeError('boom')",
    "raises what cannot be printed": "class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E",
    "recurses when it is imported": "def f():\n    return f()\nf()",
    "imports what is not there": "import nowhere_at_all",
    "prints and warns and raises": "import sys, warnings\nprint('hi')\nprint('oops', file=sys.stderr)\nwarnings.warn('careful')\nraise ValueError('boom')",
    "has Params of another kind": QUERY + "class Params:\n    pass",
    "has Params that are no class": QUERY + "Params = 5",
    "has Params without a default": PARAMS + QUERY + "class Params(Config):\n    width: int",
    "has Params whose validator raises TypeError": PARAMS + QUERY + "class Params(Config):\n    @model_validator(mode='before')\n    @classmethod\n    def f(cls, v):\n        raise TypeError('boom')",
    "has Params whose validator raises ValueError": PARAMS + QUERY + "class Params(Config):\n    @model_validator(mode='after')\n    def f(self):\n        raise ValueError('a\\nb')",
    "has Params whose validator exits": PARAMS + QUERY + "class Params(Config):\n    @model_validator(mode='after')\n    def f(self):\n        raise SystemExit(3)",
    "has Params whose validator recurses": PARAMS + QUERY + "class Params(Config):\n    @model_validator(mode='after')\n    def f(self):\n        return self.f()",
    "has a check that raises": QUERY + "def check(params, model, images):\n    raise KeyError('boom')",
    "has a check that raises an input error": QUERY + "from fishermask.errors import InputError\ndef check(params, model, images):\n    raise InputError('width: is too small')",
    "has a check that exits": QUERY + "def check(params, model, images):\n    raise SystemExit",
    "has a check that returns junk": QUERY + "def check(params, model, images):\n    return 'a lot'",
    "has a check that takes nothing": QUERY + "def check():\n    pass",
    "has a check that cannot be called": QUERY + "check = 5",
}  # fmt: skip
for number, name in enumerate(STRATEGIES):
    case(f"a strategy {name}", dry(f"strategy=theirs_{number}"), "strategy")

# ---- Data files. ------------------------------------------------------------------------------------------------------


def png(array, **save):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **save)
    return buffer.getvalue()


GRAY = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
GOOD = png(GRAY)
TEXT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path, images=(GOOD, GOOD), labels=(0, 1), paths=None, kind=TEXT, notes=None, columns=None, **write):
    paths = paths or [None] * len(images)
    structs = [
        i if i is None or isinstance(i, dict) else {"bytes": i, "path": p} for i, p in zip(images, paths, strict=True)
    ]
    table = pa.table(columns or {"image": pa.array(structs, kind), "label": pa.array(labels)})
    pq.write_table(table.replace_schema_metadata(notes), path, **write)
    return path


def with_damage(start, length, byte=0xA5, **write):
    """Return a writer of a Parquet file with ``length`` overwritten bytes, from the fraction ``start`` of the file."""

    def make(path):
        noise = np.random.default_rng(1)
        images = [png(noise.integers(0, 256, (28, 28), np.uint8)) for _ in range(60)]
        write_parquet(path, images, [0, 1] * 30, [f"{i}.png" for i in range(60)], **write)
        content = bytearray(path.read_bytes())
        at = int(start * len(content))
        content[at : at + length] = bytes([byte]) * min(length, len(content) - at)
        path.write_bytes(content)

    return make


def with_images(*contents):
    return lambda path: write_parquet(path, contents, list(range(len(contents))))


def encode_image(mode, format_, size=(28, 28)):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format_)
    return buffer.getvalue()


def decompression_bomb():
    """Return a PNG whose header declares 60,000 x 60,000 pixels."""
    header = struct.pack(">II", 60_000, 60_000) + GOOD[24:29]
    import zlib

    return GOOD[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + GOOD[33:]


def with_class_names(*classes, image=None):
    note = json.dumps({"info": {"features": {"label": {"names": list(classes)}}}})
    return lambda path: write_parquet(path, [image or GOOD] * 2, notes={"huggingface": note})


def with_two_columns(name):
    array = pa.array([{"bytes": GOOD, "path": None}] * 2, TEXT)
    columns = {"image": array, "label": pa.array([0, 1])}
    return lambda path: pq.write_table(
        pa.Table.from_arrays([array, columns["label"], columns[name]], ["image", "label", name]), path
    )


NUMBERS = pa.struct([("bytes", pa.binary()), ("path", pa.int64())])
WORDS = pa.struct([("bytes", pa.string()), ("path", pa.string())])
LISTS = pa.struct([("bytes", pa.list_(pa.uint8())), ("path", pa.string())])
DATA_FILES = {
    "is empty": (lambda path: path.write_bytes(b""), "data.train"),
    "is text": (lambda path: path.write_text("hello"), "data.train"),
    "is noise": (lambda path: path.write_bytes(bytes(range(256)) * 40), "data.train"),
    "is cut short": (lambda path: path.write_bytes(write_parquet(path).read_bytes()[:-100]), "data.train"),
    "is only the magic number": (lambda path: path.write_bytes(b"PAR1PAR1"), "data.train"),
    "has an endless footer": (lambda path: path.write_bytes(b"PAR1" + b"\xff" * 4 + b"PAR1"), "data.train"),
    "has damaged pages": (with_damage(0.1, 200, compression="none"), "data"),
    "has damaged pages (snappy)": (with_damage(0.1, 200, compression="snappy"), "data"),
    "has damaged pages (gzip)": (with_damage(0.1, 200, compression="gzip"), "data"),
    "has damaged pages (zstd)": (with_damage(0.1, 200, compression="zstd"), "data"),
    "has damaged pages (brotli)": (with_damage(0.1, 200, compression="brotli"), "data"),
    "has damaged pages (lz4)": (with_damage(0.1, 200, compression="lz4"), "data"),
    "has zeros for pages": (with_damage(0.05, 20000, 0, compression="zstd"), "data"),
    "has damaged pages of labels": (lambda path: write_damaged_labels(path), "data.train"),
    "has a damaged footer": (with_damage(0.99, 30), "data.train"),
    "has no rows": (lambda path: write_parquet(path, [], pa.array([], pa.int64())), "data.train"),
    "has no image column": (lambda path: write_parquet(path, columns={"label": [0, 1]}), "data.image_column"),
    "has no label column": (lambda path: write_parquet(path, columns={"image": pa.array([{"bytes": GOOD, "path": None}], TEXT)}), "data.label_column"),
    "has two image columns": (lambda path: write_parquet(path, columns={"a": pa.array([{"bytes": GOOD, "path": None}], TEXT), "b": pa.array([{"bytes": GOOD, "path": None}], TEXT), "label": [0]}), "data.image_column"),
    "has the label twice": (with_two_columns("label"), "data.label_column"),
    "has the image twice": (with_two_columns("image"), "data.image_column"),
    "has paths that are numbers": (lambda path: write_parquet(path, [{"bytes": GOOD, "path": 1}] * 2, kind=NUMBERS), "data.image_column"),
    "has bytes that are text": (lambda path: write_parquet(path, [{"bytes": "x", "path": "a"}] * 2, kind=WORDS), "data.image_column"),
    "has bytes that are lists": (lambda path: write_parquet(path, [{"bytes": [1], "path": "a"}] * 2, kind=LISTS), "data.image_column"),
    "has labels that are text": (lambda path: write_parquet(path, labels=["a", "b"]), "data.label_column"),
    "has labels that are fractions": (lambda path: write_parquet(path, labels=[0.0, 1.0]), "data.label_column"),
    "has labels that are true or false": (lambda path: write_parquet(path, labels=[True, False]), "data.label_column"),
    "has labels that are dates": (lambda path: write_parquet(path, labels=[datetime.date(2024, 1, 1)] * 2), "data.label_column"),
    "has a negative label": (lambda path: write_parquet(path, labels=[0, -1]), "row 1: label"),
    "has a label of 2^63": (lambda path: write_parquet(path, labels=pa.array([0, 2**63], pa.uint64())), "row 1: label"),
    "has a missing label": (lambda path: write_parquet(path, labels=[0, None]), "row 1: label"),
    "has a label that is no class": (lambda path: write_parquet(path, labels=[0, 2], notes={"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "b"]}}}})}), "row 1: label"),
    "names a class twice": (with_class_names("cat", "cat"), "data.train", "twice"),
    "has a missing image": (with_images(GOOD, None), "data.train", "row 1"),
    "has an image without bytes": (with_images(GOOD, {"bytes": None, "path": "a"}), "data.train", "row 1"),
    "has an empty image": (with_images(GOOD, b""), "data.train", "row 1"),
    "has an image that is text": (with_images(GOOD, b"hello"), "data.train", "row 1"),
    "has an image cut short": (with_images(GOOD, GOOD[:300]), "data.train", "row 1"),
    "has an image with damaged pixels": (with_images(GOOD, GOOD[:200] + b"\0" * 100 + GOOD[300:]), "data.train", "row 1"),
    "has a PNG that expands to 3.6 GB": (with_images(GOOD, decompression_bomb()), "data.train", "row 1"),
    "has an image of another size": (with_images(GOOD, png(GRAY[:20])), "data.image_size", "row 1"),
    "has an image of 32-bit numbers": (with_images(GOOD, encode_image("I", "TIFF")), "data.train", "row 1"),
    "has an image of floating-point numbers": (with_images(GOOD, encode_image("F", "TIFF")), "data.train", "row 1"),
    "has a PostScript program": (with_images(GOOD, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"), "row 1", "UnidentifiedImageError"),
    "has an SVG": (with_images(GOOD, b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "data.train", "row 1"),
    "has a TIFF without pixels": (with_images(GOOD, b"II*\0\x08\0\0\0\0\0\0\0\0\0"), "data.train", "row 1"),
    "has images too small for the model": (with_images(png(GRAY[:4, :4]), png(GRAY[:4, :4])), "model"),
    "has images that are not square": (with_images(png(GRAY[:20]), png(GRAY[:20])), "model"),
    "has paths that are no UTF-8": (lambda path: write_invalid_paths(path), "data.train"),
}  # fmt: skip


def write_damaged_labels(path):
    """Write a Parquet file with overwritten bytes in the compressed pages of the label column."""
    write_parquet(path, [GOOD] * 200, [0, 1] * 100, compression="gzip", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    assert column.path_in_schema == "label"
    content = bytearray(path.read_bytes())
    end = column.data_page_offset + column.total_compressed_size
    content[end - 20 : end] = b"\xa5" * 20
    path.write_bytes(content)


def write_invalid_paths(path):
    """Write a Parquet file whose paths are not UTF-8."""
    wrong = pa.StringArray.from_buffers(2, pa.py_buffer(struct.pack("<iii", 0, 1, 2)), pa.py_buffer(b"\xff\xfe"))
    image = pa.StructArray.from_arrays([pa.array([GOOD, GOOD], pa.binary()), wrong], ["bytes", "path"])
    pq.write_table(pa.table({"image": image, "label": [0, 1]}), path)


for name, (make, *words) in DATA_FILES.items():
    model = ["model=small_cnn"] if words == ["model"] else []
    case(f"a data file {name}", dry("data={name: parquet, train: x.parquet, test: y.parquet}", *SMALL_BUDGET, *model),
         *words, files=dict.fromkeys(("x.parquet", "y.parquet"), make))  # fmt: skip
for name, (train, words, files) in {
    "is not there": ("nowhere.parquet", "data.train", {}),
    "is not named": ("''", "data.train", {}),
    "is a blank": ("'  '", "data.train", {}),
    "is null": ("null", "data.train", {}),
    "is in the home of nobody": ("~nosuchuser/x.parquet", "data.train", {}),
    "has a name of 300 letters": (LETTERS, "data.train", {}),
    "has a name with NUL": ('"a\\0b"', "train, line 1", {}),
    "has a name with a line break": ('"a\\nb"', "data.train", {}),
    "is a number": ("5", "data.train", {}),
    "is a list": ("[x.parquet]", "data.train", {}),
    "is below a file": ("tiny.yaml/x", "data.train", {}),
    "is a folder without Parquet files": ("empty", "data.train", {"empty/readme.txt": b"nothing"}),
    "is a glob of nothing": ("'*.parquet'", "data.train", {}),
    "is an open bracket": ("'a[.parquet'", "data.train", {}),
    "is a device": ("/dev/zero", "data.train", {}),
    "is a sweep file": ("tiny.yaml", "data.train", {}),
    "is a folder in /proc": ("/proc/self", "data.train", {}),
}.items():
    case(
        f"data.train {name}",
        dry(f"data={{name: parquet, train: {train}, test: other.txt}}"),
        words,
        files=files | {"other.txt": b"x"},
    )
case("data.test is data.train", dry("data={name: parquet, train: x.parquet, test: ./x.parquet}"),
     "data.test: x.parquet is also a training file", files={"x.parquet": write_parquet})  # fmt: skip
case(
    "data.test is missing",
    dry("data={name: parquet, train: x.parquet}"),
    "data.test",
    files={"x.parquet": write_parquet},
)
for name, other, words in (
    ("is of other classes", with_class_names("dog", "cat"), "data.test"),
    ("is in color", with_class_names("cat", "dog", image=png(np.zeros((28, 28, 3), np.uint8))), "data.channels"),
    ("is of another size", with_class_names("cat", "dog", image=png(GRAY[:20, :20])), "data.image_size"),
    ("does not decode", with_images(GOOD, b"x"), "data.test"),
    ("is damaged", with_damage(0.1, 200, compression="zstd"), "data.test"),
):
    files = {"a.parquet": with_class_names("cat", "dog"), "b.parquet": other}
    case(f"data.test {name}", dry("data={name: parquet, train: a.parquet, test: b.parquet}"), words, files=files)


def write_idx_files(folder, change):
    """Write MNIST's four files; ``change`` has other contents for some: name -> bytes, or a function of the path."""
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 20), ("t10k", 10)):
        images = bytes([0, 0, 8, 3]) + struct.pack(">III", count, 28, 28) + bytes(count * 784)
        labels = bytes([0, 0, 8, 1]) + struct.pack(">I", count) + bytes([i % 10 for i in range(count)])
        for name, value in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = change.get(name, value)
            content(raw / name) if callable(content) else (raw / name).write_bytes(content)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
IDX_FILES = {
    "is empty": {IMAGES: b""},
    "is noise": {IMAGES: bytes(range(256))},
    "is cut short": {IMAGES: bytes([0, 0, 8, 3]) + struct.pack(">III", 20, 28, 28) + bytes(100)},
    "is compressed": {IMAGES: b"\x1f\x8b\x08" + bytes(100)},
    "has another type": {IMAGES: bytes([0, 0, 13, 3]) + struct.pack(">III", 20, 28, 28) + bytes(20 * 784 * 4)},
    "has an unknown type": {IMAGES: bytes([0, 0, 99, 3]) + bytes(100)},
    "has other dimensions": {IMAGES: bytes([0, 0, 8, 2]) + struct.pack(">II", 20, 784) + bytes(20 * 784)},
    "has no images": {IMAGES: bytes([0, 0, 8, 3]) + struct.pack(">III", 0, 28, 28)},
    "says that it has 2^32 images": {IMAGES: bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(100)},
    "has fewer labels than images": {LABELS: bytes([0, 0, 8, 1]) + struct.pack(">I", 5) + bytes(5)},
    "has labels that are no class": {LABELS: bytes([0, 0, 8, 1]) + struct.pack(">I", 20) + b"\xff" * 20},
    "is a FIFO": {IMAGES: os.mkfifo},
    "is a broken link": {IMAGES: lambda path: path.symlink_to("nowhere")},
    "is a link to itself": {IMAGES: lambda path: path.symlink_to(path.name)},
    "is a folder": {IMAGES: lambda path: path.mkdir()},
}
for name, change in IDX_FILES.items():
    files = {"root": lambda path, change=change: write_idx_files(path, change)}
    case(f"an IDX file {name}", dry("data={name: MNIST, root: root}"), "data.root", files=files)
for name, root in {"is not named": "", "is not there": "root: nowhere", "is a file": "root: tiny.yaml", "is a device": "root: /dev/null",
                   "is a FIFO": "root: fifo", "is a link to itself": "root: loop"}.items():  # fmt: skip
    files = {"fifo": os.mkfifo, "loop": lambda path: path.symlink_to("loop")}
    for dataset in ("CIFAR10", "SVHN") if name != "is a device" else ("FashionMNIST",):
        case(f"the root of {dataset} {name}", dry(f"data={{name: {dataset}, {root}}}"), "data.root", files=files)
case("CIFAR10 of noise", dry("data={name: CIFAR10, root: .}"), "data.root",
     files={f"cifar-10-batches-py/data_batch_{n}": b"noise" for n in range(1, 6)})  # fmt: skip
case("SVHN of noise", dry("data={name: SVHN, root: .}"), "data.root", files={"train_32x32.mat": b"noise"})

# ---- Results folders. -------------------------------------------------------------------------------------------------

ROUND = {
    "round": 0, "labels": 10, "accuracy": 0.5, "balanced_accuracy": 0.5, "macro_f1": 0.5, "recall": {"a": 0.5},
    "batch": ["x"], "batch_classes": {"a": 1}, "seconds": {"train": 1.0}, "ended_by": "cap", "epochs": 1,
    "train_accuracy": 1.0, "notes": {},
}  # fmt: skip
SETTINGS = yaml.safe_dump({"strategy": "random"}).encode()


def line(**changes):
    return json.dumps(ROUND | changes).encode() + b"\n"


RESULTS = {
    "config.yaml is not YAML": ({"config.yaml": b"a: ["}, "config.yaml"),
    "config.yaml is empty": ({"config.yaml": b""}, "config.yaml"),
    "config.yaml is a folder": ({"config.yaml": lambda path: path.mkdir()}, "config.yaml"),
    "config.yaml is a FIFO": ({"config.yaml": os.mkfifo}, "config.yaml"),
    "config.yaml is a broken link": ({"config.yaml": lambda path: path.symlink_to("nowhere")}, "config.yaml"),
    "config.yaml is binary": ({"config.yaml": bytes(range(256))}, "config.yaml"),
    "config.yaml has no grid": ({"config.yaml": b"name: x\n"}, "config.yaml"),
    "config.yaml has a grid of numbers": ({"config.yaml": b"name: x\ngrid: {5: [1]}\n"}, "config.yaml"),
    "there is no config.yaml": ({"config.yaml": None}, "holds no results"),
    "there is no run": ({"runs/a/config.yaml": None, "runs/a/rounds.jsonl": None}, "no round is finished"),
    "there is no round": ({"runs/a/rounds.jsonl": None}, "no round is finished"),
    "a run's config.yaml is not YAML": ({"runs/a/config.yaml": b"a: ["}, "runs/a/config.yaml"),
    "a run's config.yaml is a folder": ({"runs/a/config.yaml": lambda path: path.mkdir()}, "runs/a/config.yaml"),
    "a run's config.yaml is of another version": ({"runs/a/config.yaml": b"sed: 3\n"}, "runs/a/config.yaml"),
    "a run's config.yaml is a list": ({"runs/a/config.yaml": b"[1]\n"}, "runs/a/config.yaml"),
    "rounds.jsonl is no JSON": ({"runs/a/rounds.jsonl": b"hello\n"}, "rounds.jsonl"),
    "rounds.jsonl is binary": ({"runs/a/rounds.jsonl": bytes(range(256)) + b"\n"}, "rounds.jsonl"),
    "rounds.jsonl is a folder": ({"runs/a/rounds.jsonl": lambda path: path.mkdir()}, "rounds.jsonl"),
    "rounds.jsonl is a FIFO": ({"runs/a/rounds.jsonl": os.mkfifo}, "rounds.jsonl"),
    "rounds.jsonl is a link to itself": ({"runs/a/rounds.jsonl": lambda path: path.symlink_to(path.name)}, "rounds.jsonl"),
    "rounds.jsonl holds numbers": ({"runs/a/rounds.jsonl": b"5\n"}, "rounds.jsonl"),
    "rounds.jsonl holds an empty line": ({"runs/a/rounds.jsonl": b"\n" + line()}, "rounds.jsonl"),
    "rounds.jsonl begins with round 1": ({"runs/a/rounds.jsonl": line(round=1)}, "rounds.jsonl"),
    "rounds.jsonl has a round twice": ({"runs/a/rounds.jsonl": line() * 2}, "rounds.jsonl"),
    "rounds.jsonl lacks the accuracy": ({"runs/a/rounds.jsonl": b'{"round": 0}\n'}, "rounds.jsonl"),
    "rounds.jsonl has text for the accuracy": ({"runs/a/rounds.jsonl": line(accuracy="high")}, "rounds.jsonl"),
    "rounds.jsonl has a list for the recall": ({"runs/a/rounds.jsonl": line(recall=[1, 2])}, "rounds.jsonl"),
    "rounds.jsonl has text in the recall": ({"runs/a/rounds.jsonl": line(recall={"a": "x"})}, "rounds.jsonl"),
    "rounds.jsonl has a number for the batch": ({"runs/a/rounds.jsonl": line(batch=5)}, "rounds.jsonl"),
    "rounds.jsonl has null for the seconds": ({"runs/a/rounds.jsonl": line(seconds=None)}, "rounds.jsonl"),
    "rounds.jsonl is nested without end": ({"runs/a/rounds.jsonl": b"[" * 100_000 + b"\n"}, "rounds.jsonl"),
    "summary.md is a folder": ({"summary.md/x": b""}, "summary.md"),
    "results.parquet is a folder": ({"results.parquet/x": b""}, "results.parquet"),
}  # fmt: skip
for name, (changes, words) in RESULTS.items():
    content = {
        "config.yaml": b"name: x\ngrid: {seed: [0]}\n",
        "runs/a/config.yaml": SETTINGS,
        "runs/a/rounds.jsonl": line(),
    }
    content |= changes
    files = {f"results/{path}": value for path, value in content.items() if value is not None}
    case(f"a report where {name}", ["report", "results"], words, files=files)
TRACES = {"a report where summary.md is a folder": {"results.parquet", "results.csv", "curves.png"}}
"""Case -> files that the command writes before it fails."""

for name, (files, words) in {
    "holds other files": ({"results/tiny/notes.txt": b"mine"}, "name"),
    "is a file": ({"results/tiny": b"mine"}, "output"),
    "is a FIFO": ({"results/tiny": os.mkfifo}, "output"),
    "is a link to itself": ({"results/tiny": lambda path: path.symlink_to("tiny")}, "output"),
    "holds another sweep": ({"results/tiny/config.yaml": b"name: tiny\ngrid: {budget.query: [5]}\n"}, "name"),
    "holds a damaged config.yaml": ({"results/tiny/config.yaml": b"a: ["}, "config.yaml"),
    "holds a config.yaml that is a folder": ({"results/tiny/config.yaml": lambda path: path.mkdir()}, "config.yaml"),
    "holds a config.yaml that is a FIFO": ({"results/tiny/config.yaml": os.mkfifo}, "config.yaml"),
    "holds damaged rounds": ({"results/tiny/runs/random-seed=0/rounds.jsonl": b"x\n", "results/tiny/config.yaml": yaml.safe_dump(TINY).encode()}, "rounds.jsonl"),
    "holds rounds that are a FIFO": ({"results/tiny/runs/random-seed=0/rounds.jsonl": os.mkfifo, "results/tiny/config.yaml": yaml.safe_dump(TINY).encode()}, "rounds.jsonl"),
}.items():  # fmt: skip
    case(f"the results folder {name}", dry(), words, files=files)
case("results is a file", dry(), "output", files={"results": b"mine"})

# ---- The cache. -------------------------------------------------------------------------------------------------------


for name, value in {
    "is a file": "tiny.yaml", "is a device": "/dev/null", "is below a device": "/dev/null/x", "is in /proc": "/proc/cache",
    "is in the home of nobody": "~nosuchuser/x", "has a name of 300 letters": LETTERS, "is a blank": " ",
    "has a line break": "a\nb", "is 5,000 letters": "x/" * 2500, "is a link to itself": "loop", "is a FIFO": "fifo",
    "is a broken link": "nowhere",
}.items():  # fmt: skip
    links = {"loop": lambda p: p.symlink_to("loop"), "nowhere": lambda p: p.symlink_to("none"), "fifo": os.mkfifo}
    case(f"FISHERMASK_CACHE {name}", dry(), "FISHERMASK_CACHE", files=links, env={"FISHERMASK_CACHE": value})
case("XDG_CACHE_HOME has a line break", dry(), "XDG_CACHE_HOME", env={"FISHERMASK_CACHE": "", "XDG_CACHE_HOME": "a\nb"})


def make_socket(path):
    working_folder = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(working_folder)


def prepare(folder, files):
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)


def write_models(folder):
    folder.mkdir()
    source = [PRELUDE]
    for number, body in enumerate(FACTORIES.values()):
        source.append(f"def f{number}(num_classes):\n" + textwrap.indent(body.replace("; ", "\n"), "    "))
    for name, signature in SIGNATURES.items():
        source.append(f"def g_{name.replace(' ', '_')}{signature}:\n    return Net(10)")
    (folder / "their_models.py").write_text("\n\n".join(source))
    for number, content in enumerate(MODULES.values()):
        (folder / f"their_module_{number}.py").write_bytes(content)
