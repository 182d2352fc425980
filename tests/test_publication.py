"""An output directory appears complete or not at all, whatever happens while it is written."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vitshrink
from vitshrink.errors import OutputError
from vitshrink.models import publication
from vitshrink.models.publication import check_space, publish

OURS = '{"quantization_config": {"quant_method": "vitshrink"}}'


def write(target: Path, text: str = "new", **options: object) -> None:
    with publish(target, **options) as staging:  # type: ignore[arg-type]
        (staging / "config.json").write_text(OURS)
        (staging / "sub").mkdir()
        (staging / "sub" / "text").write_text(text)


def fail(target: Path, error: BaseException, **options: object) -> None:
    with publish(target, **options) as staging:  # type: ignore[arg-type]
        (staging / "file").write_text("half")
        raise error


def content(target: Path) -> str:
    return (target / "sub" / "text").read_text()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An output of an earlier run."""
    write(tmp_path / "out", "old")
    return tmp_path / "out"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "models" / "dense").mkdir(parents=True)
    (tmp_path / "models" / "dense" / "config.json").write_text("{}")
    return tmp_path / "models" / "dense"


@pytest.mark.parametrize(
    "name", ["out", "a/b/c", "with space", os.fsdecode("ünï-çødé 模型".encode()), ".hidden", "out.v1", "[a]*?"]
)
def test_the_target_appears_with_nothing_beside_it(name: str, tmp_path: Path) -> None:
    target = tmp_path / name
    with publish(target) as staging:
        assert staging.parent == target.parent
        assert staging.name.startswith(f".{target.name}.vitshrink-{os.getpid()}-")
        assert not target.exists()
        (staging / "file").write_text("content")
    assert (target / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_relative_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("here"))
    write(Path("there/"))
    assert content(tmp_path / "here") == content(tmp_path / "there") == "new"


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert content(tmp_path / "out") == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
def test_after_an_exception_nothing_is_left(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error, match=r"^reason$"):
        fail(tmp_path / "new" / "parent" / "out", error("reason"))
    assert list(tmp_path.iterdir()) == []


def test_after_an_exception_the_old_output_is_intact(old: Path) -> None:
    with pytest.raises(RuntimeError):
        fail(old, RuntimeError(), overwrite=True)
    assert content(old) == "old"
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_an_output_is_overwritten_only_when_asked(old: Path) -> None:
    with pytest.raises(OutputError, match=r"exists and is not empty: .*--overwrite"):
        write(old)
    assert content(old) == "old"
    write(old, overwrite=True)
    assert content(old) == "new"
    assert [path.name for path in old.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "years of work"},
        {"config.json": '{"model_type": "vit"}'},
        {"config.json": '{"quantization_config": {"quant_method": "gptq"}}'},
        {"config.json": "not json"},
        {"config.json": "[]"},
        {"report.json": '{"other": 1}'},
        {"report.json": '"vitshrink"'},
    ],
)
def test_what_others_wrote_is_never_overwritten(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name, text in files.items():
        (tmp_path / "out" / name).write_text(text)
    with pytest.raises(OutputError, match="vitshrink did not write"):
        write(tmp_path / "out", overwrite=True)
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == files


def test_a_report_of_ours_marks_an_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text('{"vitshrink": "0.1.0"}')
    write(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == "new"


def test_files_and_links_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nothing")
    for name, message in (("file", "is a file"), ("link", "is a link"), ("dangling", "is a link")):
        with pytest.raises(OutputError, match=message):
            write(tmp_path / name, overwrite=True)
    with pytest.raises(OutputError, match=r"cannot write .*(Not a directory|File exists)"):
        write(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "text"


def test_a_parent_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link" / "out")
    assert content(tmp_path / "real" / "out") == "new"


def test_the_source_model_is_protected(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    (source / "config.json").write_text(OURS)
    for target in (
        source,
        source / "out",
        source / "deep" / "out",
        source.parent,
        tmp_path,
        tmp_path / "link" / "out",
        source / ".." / "dense",
    ):
        with pytest.raises(OutputError, match="is, contains or is inside the source model"):
            write(target, overwrite=True, protect=source)
    with pytest.raises(OutputError, match="source model"):
        write(source / "out", protect=tmp_path / "link")
    assert [path.name for path in source.iterdir()] == ["config.json"]
    write(source.parent / "dense-small", protect=source)


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    publishing = publish(tmp_path / "out")
    publishing.__enter__()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").write_text("theirs")
    with pytest.raises(OutputError, match="exists and is not empty"):
        publishing.__exit__(None, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "other").read_text() == "theirs"


def test_a_name_too_long_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        write(tmp_path / ("x" * 250))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "file_mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_modes_that_the_umask_asks_for(mask: int, file_mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with publish(tmp_path / "out") as staging:
            (staging / "sub").mkdir(mode=0o700)
            (staging / "sub" / "private").touch(mode=0o600)  # as safetensors makes them
            (staging / "sub" / "program").touch(mode=0o777)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    assert modes == {"sub": 0o777 & ~mask, "private": file_mode, "program": file_mode, "SHA256SUMS": file_mode}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


@pytest.fixture
def python(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Runs a program in another process, with ``publish`` and the target ``sys.argv[1]`` at hand."""
    started = []

    def start(program: str, target: Path, **options: object) -> subprocess.Popen[str]:
        prelude = (
            "import os, resource, sys, time\nfrom pathlib import Path\n"
            "from vitshrink.models.publication import publish\nfrom vitshrink.errors import OutputError\n"
        )
        process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-c", prelude + textwrap.dedent(program), str(target)],
            env={**os.environ, "PYTHONPATH": str(Path(vitshrink.__file__).parents[1]), "HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,  # type: ignore[call-overload]
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


HOLD = """
    with publish(Path(sys.argv[1]), overwrite=True) as staging:
        (staging / "file").write_text("half")
        print("writing", flush=True)
        time.sleep(60)
"""


@pytest.mark.slow
def test_a_second_run_stops_and_a_killed_one_is_cleaned_up(
    python: Callable[..., subprocess.Popen[str]], old: Path
) -> None:
    process = python(HOLD, old)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    started = time.monotonic()
    with pytest.raises(OutputError, match="another vitshrink run writes to"):
        write(old, overwrite=True)
    assert time.monotonic() - started < 1
    write(old.parent / "other")  # a different target is not held up
    write(old.parent / "ou")
    assert process.poll() is None

    process.send_signal(signal.SIGKILL)
    process.wait()
    (leftover,) = (path for path in old.parent.iterdir() if path.name.startswith(".out.vitshrink-"))
    assert (leftover / "file").read_text() == "half"
    assert content(old) == "old"
    write(old, overwrite=True)
    assert content(old) == "new"
    assert {path.name for path in old.parent.iterdir()} == {"out", "other", "ou"}


def test_an_output_moved_aside_by_a_killed_run_comes_back(old: Path) -> None:
    aside = old.parent / ".out.vitshrink-old-0123abcd"
    old.rename(aside)
    with pytest.raises(RuntimeError):
        fail(old, RuntimeError(), overwrite=True)
    assert content(old) == "old"
    shutil.copytree(old, aside)
    write(old, overwrite=True)
    assert content(old) == "new"
    assert not aside.exists()


def test_a_rename_that_fails_brings_the_old_output_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == old and f"-{os.getpid()}-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(old, overwrite=True)
    assert content(old) == "old"
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_of_two_runs_at_once_one_goes_on(tmp_path: Path) -> None:
    """Both are in place and see each other: the one that came first stays."""
    with publish(tmp_path / "out") as first:
        second = tmp_path / f".out.vitshrink-{os.getpid()}-{'f' * 20}"
        second.mkdir()
        lock = os.open(second, os.O_RDONLY)
        assert publication.try_lock(lock)
        publication._clear_leftovers(tmp_path / "out", first)
        with pytest.raises(OutputError, match="another vitshrink run"):
            publication._clear_leftovers(tmp_path / "out", second)
        os.close(lock)
        second.rmdir()


def test_a_run_killed_before_it_had_its_lock_leaves_nothing_for_long(tmp_path: Path) -> None:
    young, aged = tmp_path / ".out.new-abc", tmp_path / ".out.new-def"
    young.mkdir()
    aged.mkdir()
    os.utime(aged, (0, 0))
    write(tmp_path / "out")
    assert young.exists()
    assert not aged.exists()


def test_what_only_looks_like_a_leftover_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".out.vitshrink-notes").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / ".out.vitshrink-1-abc").symlink_to("real")
    (tmp_path / ".out.vitshrink-2-abc").write_text("text")
    before = set(tmp_path.iterdir())
    write(tmp_path / "out")
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out"}


def test_without_locks_of_the_file_system_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    (tmp_path / ".out.vitshrink-1-abc").mkdir()
    monkeypatch.setattr("fcntl.flock", unsupported)
    write(tmp_path / "out")
    assert content(tmp_path / "out") == "new"
    assert (tmp_path / ".out.vitshrink-1-abc").exists()


@pytest.mark.slow
def test_a_read_only_parent_is_named(python: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o555)
    program = """
        if os.geteuid() == 0:
            os.seteuid(65534)  # permissions do not bind root
        os.umask(0)
        try:
            with publish(Path(sys.argv[1])): pass
        except OutputError as error:
            print(error)
    """
    for directory in (tmp_path, *tmp_path.parents[:3]):  # as deep as a worker's
        if not directory.stat().st_mode & stat.S_IXOTH:
            directory.chmod(0o755)
    output, errors = python(program, parent / "out").communicate(timeout=300)
    assert "cannot write" in output, errors
    assert "Permission denied" in output
    assert list(parent.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(
    python: Callable[..., subprocess.Popen[str]], vit_directory: Path, old: Path
) -> None:
    program = f"""
        from vitshrink.models import checkpoint, loading as models
        loaded = models.load_dense({str(vit_directory)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        for overwrite, target in ((True, Path(sys.argv[1])), (False, Path(sys.argv[1] + "-2"))):
            try:
                with publish(target, overwrite=overwrite) as staging:
                    checkpoint.save(loaded.model, staging, source=loaded)
            except OutputError as error:
                print(error)
    """
    output, errors = python(program, old).communicate(timeout=300)
    assert output.count("cannot write the checkpoint to") == 2, errors
    assert "free space" in output
    assert content(old) == "old"
    assert [path.name for path in old.parent.iterdir() if path.name.startswith((".out", "out"))] == ["out"]


def test_space_is_checked_beforehand(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "yet", 1000)
    with pytest.raises(OutputError, match=r"MB free, but about 1000000000000\.0 MB are needed"):
        check_space(tmp_path / "not" / "yet", 10**18)


# Several models at once


def test_several_models_appear_together(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with publish(target, parts=["a", "b"]) as staging:
        for part in ("a", "b"):
            (staging / part / "weights").write_text(part)
        assert not target.exists()
    assert [(target / part / "weights").read_text() for part in ("a", "b")] == ["a", "b"]
    assert all((target / part / "SHA256SUMS").exists() for part in ("a", "b"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def models(target: Path, *names: str) -> None:
    for name in names:
        (target / name).mkdir(parents=True)
        (target / name / "report.json").write_text('{"vitshrink": "0.1.0"}')


def test_several_models_replace_the_same_ones_and_their_comparison(tmp_path: Path) -> None:
    target = tmp_path / "out"
    models(target, "a", "b")
    (target / "comparison.md").write_text("old")
    with publish(target, parts=["a", "b"], overwrite=True) as staging:
        (staging / "a" / "weights").write_text("new")
    assert sorted(path.name for path in target.iterdir()) == ["a", "b"]
    assert (target / "a" / "weights").exists()


@pytest.mark.parametrize("other", ["c", "thesis.tex"])
def test_several_models_never_replace_what_they_do_not_write_again(other: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    models(target, "a", other)
    refused = pytest.raises(OutputError, match=f"contains {other}. This job does not write these")
    with refused, publish(target, parts=["a", "b"], overwrite=True):
        pytest.fail("not refused")
    assert sorted(path.name for path in target.iterdir()) == sorted(["a", other])


def test_a_part_that_others_wrote_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    models(target, "a")
    (target / "b").mkdir()
    (target / "b" / "notes").write_text("mine")
    refused = pytest.raises(OutputError, match="vitshrink did not write")
    with refused, publish(target, parts=["a", "b"], overwrite=True):
        pytest.fail("not refused")
    assert (target / "b" / "notes").read_text() == "mine"
