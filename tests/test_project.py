"""The package, the cluster file and the documents."""

import platform
import re
import subprocess
import sys
import zipfile
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
import torch
import yaml

from fishermask import query_strategies

ROOT = Path(__file__).parent.parent


def test_the_standard_librarys_platform_is_not_shadowed():
    assert not (ROOT / "platform/__init__.py").exists()
    assert platform.system()
    code = "import platform; print(platform.system())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == platform.system()


def test_a_clone_without_symbolic_links_gives_a_complete_wheel(tmp_path):
    """Git on Windows, and archives unpacked there, leave a link as a text file that holds its target."""
    source = tmp_path / "clone"
    tracked_files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked_files.splitlines():
        target, path = source / name, ROOT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.write_text(str(path.readlink()))
        elif path.exists():
            target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"fishermask/query_strategies/{name}.py" for name in query_strategies.available()} <= set(names)
    assert {"fishermask/data/fashion_mnist/train.parquet", "fishermask/data/fashion_mnist/LICENSE"} <= set(names)
    package = ROOT / "platform/fishermask"
    modules = {f"fishermask/{p.relative_to(package)}" for p in package.glob("**/*.py")}
    assert modules <= set(names)
    assert not [name for name in names if name.startswith(("strategies/", "platform/", "tests/"))]
    assert any(name.endswith("entry_points.txt") for name in names)


def test_the_cluster_file_is_valid_by_rays_own_check():
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(content))
    assert any("RAY_AUTH_MODE=token" in option for option in content["docker"]["run_options"])
    content["clustername"] = "x"
    with pytest.raises(Exception, match="clustername"):
        validate_config(prepare_config(content))


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_documents_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_readme_is_short_and_its_examples_run(tmp_path):
    from fishermask.sweeps import sweep_file

    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "make demo" in text
    assert "make test" in text
    for number, content in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.S)):
        file = tmp_path / f"example_{number}.yaml"
        file.write_text(content)
        assert sweep_file.expand(sweep_file.load(file)).runs
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    assert any("fishermask.select(" in example for example in examples)
    for example in examples:
        names = {"__name__": "example", "model": torch.nn.Linear(4, 3), "pool": torch.randn(300, 4)}
        exec(compile(example, "README.md", "exec"), names)


def test_every_dependency_has_a_reason():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "docs/dependencies.md").read_text()
    for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
        name = re.match(r"[A-Za-z0-9-]+", requirement).group()
        assert f"| {name} " in text or f"| {name}[" in text, name
        assert "<" not in requirement
        assert "==" not in requirement


def test_source_version_covers_the_files_of_a_linked_strategies_folder(tmp_path, monkeypatch):
    """The strategies may be a linked folder, which ``os.walk`` leaves out by default."""
    import fishermask
    from fishermask.environment import installed_version

    folder, linked_folder = tmp_path / "platform/fishermask", tmp_path / "strategies"
    (folder / "pool").mkdir(parents=True)
    linked_folder.mkdir()
    (folder / "query_strategies").symlink_to("../../strategies")
    files = [folder / "__init__.py", folder / "pool/pool.py", linked_folder / "margin.py"]
    for file in files:
        file.write_text("x = 1\n")
    monkeypatch.setattr(fishermask, "__spec__", spec_from_file_location("fishermask", files[0]))
    versions = [installed_version()]
    for file in files:
        file.write_text("x = 2\n")
        versions.append(installed_version())
    assert len(set(versions)) == 4
    (folder / "notes.txt").write_text("no source")
    assert installed_version() == versions[-1]


def test_reference_of_the_api_has_every_public_name(tmp_path):
    import pdoc

    import fishermask

    assert "pdoc --docformat google --output-directory build/docs fishermask" in (ROOT / "Makefile").read_text()
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("fishermask", output_directory=tmp_path)
    page = (tmp_path / "fishermask.html").read_text()
    assert all(f'id="{name}"' in page for name in fishermask.__all__)
    assert 'id="runner"' not in page
