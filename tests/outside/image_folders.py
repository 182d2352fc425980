"""Folders of images that are laid out unusually, and what else lies in them."""

import json
import os
import shutil
from pathlib import Path

from .images import Images
from .oddity import oddity

CLASSIFIERS = ("Classification",)


def _some_class(folder: Path) -> Path:
    """A folder that holds images: that of a class where there are such."""
    return next(Path(directory) for directory, _, files in sorted(os.walk(folder)) if files)


def _hidden(images: Images, name: str) -> None:
    """A folder within a class folder that holds copies of its images, which nobody means."""

    def add(folder: Path) -> Path:
        inside = _some_class(folder)
        copies = [file for file in inside.iterdir() if file.is_file()]
        (inside / name).mkdir()
        for file in copies:
            shutil.copy(file, inside / name / file.name)
        return folder

    images.files.append(add)


@oddity(Images, outcome="works")
def folder_of_a_notebook(images: Images) -> None:
    _hidden(images, ".ipynb_checkpoints")


@oddity(Images, outcome="works")
def folder_of_a_mac(images: Images) -> None:
    _hidden(images, "__MACOSX")


@oddity(Images)
def folder_of_a_server(images: Images) -> None:
    _hidden(images, "@eaDir")


@oddity(Images)
def folder_within_a_class(images: Images) -> None:
    images.sure = images.sure and not images.flat
    _hidden(images, "more")
    images.sure = False


@oddity(Images, outcome="works")
def files_of_systems(images: Images) -> None:
    def add(folder: Path) -> Path:
        for place in {folder, _some_class(folder)}:
            for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._001.png", "readme.txt"):
                (place / name).write_bytes(b"system")
        return folder

    images.files.append(add)


@oddity(Images)
def linked_image(images: Images) -> None:
    def add(folder: Path) -> Path:
        inside = _some_class(folder)
        file = sorted(file for file in inside.iterdir() if file.is_file())[0]
        moved = folder.parent / "elsewhere.png"
        file.rename(moved)
        file.symlink_to(moved)
        return folder

    images.files.append(add)


@oddity(Images)
def linked_folder_within(images: Images) -> None:
    def add(folder: Path) -> Path:
        inside = _some_class(folder)
        outside = folder.parent / "elsewhere"
        outside.mkdir()
        for file in [file for file in inside.iterdir() if file.is_file()]:
            file.rename(outside / file.name)
        (inside / "linked").symlink_to(outside)
        return folder

    images.sure = images.sure and not images.flat  # a flat folder has no folders
    images.files.append(add)


@oddity(Images, only=CLASSIFIERS)
def linked_class(images: Images) -> None:
    def add(folder: Path) -> Path:
        inside = _some_class(folder)
        moved = folder.parent / "elsewhere-class"
        inside.rename(moved)
        inside.symlink_to(moved)
        return folder

    images.files.append(add)


@oddity(Images)
def cycle_of_links(images: Images) -> None:
    def add(folder: Path) -> Path:
        (_some_class(folder) / "again").symlink_to(folder)
        return folder

    images.sure = False
    images.files.append(add)


@oddity(Images)
def dangling_link(images: Images) -> None:
    def add(folder: Path) -> Path:
        (_some_class(folder) / "gone.png").symlink_to("/does/not/exist.png")
        return folder

    images.sure = False
    images.files.append(add)


@oddity(Images)
def pipe_among_images(images: Images) -> None:
    def add(folder: Path) -> Path:
        os.mkfifo(_some_class(folder) / "pipe.png")
        return folder

    images.sure = False
    images.files.append(add)


@oddity(Images)
def folder_called_like_an_image(images: Images) -> None:
    def add(folder: Path) -> Path:
        (_some_class(folder) / "folder.png").mkdir()
        return folder

    images.files.append(add)


@oddity(Images, only=CLASSIFIERS)
def empty_class(images: Images) -> None:
    def add(folder: Path) -> Path:
        (folder / "nothing in it").mkdir()
        return folder

    images.files.append(add)


@oddity(Images, slot="labels", only=CLASSIFIERS, outcome="works")
def folders_called_by_indices(images: Images) -> None:
    images.spell = lambda index, _name: str(index)


@oddity(Images, slot="labels", only=CLASSIFIERS)
def folders_in_capitals(images: Images) -> None:
    images.spell = lambda _index, name: name.upper()


@oddity(Images, slot="labels", only=CLASSIFIERS)
def flat_folder(images: Images) -> None:
    images.flat = True


def _metadata(images: Images, name: str) -> None:
    def add(folder: Path) -> Path:
        rows = [{"file_name": os.fsdecode(p.name), "label": p.label} for p in images.pictures if p.good is not None]
        if name.endswith(".jsonl"):
            lines = [json.dumps(row) for row in rows]
        else:
            lines = ["file_name,label", *(f'"{row["file_name"]}",{row["label"]}' for row in rows)]
        (folder / name).write_text("\n".join(lines) + "\n", errors="surrogateescape")
        return folder

    images.flat = True
    images.files.append(add)


@oddity(Images, slot="labels", only=CLASSIFIERS)
def labels_in_metadata_csv(images: Images) -> None:
    _metadata(images, "metadata.csv")


@oddity(Images, slot="labels", only=CLASSIFIERS)
def labels_in_metadata_jsonl(images: Images) -> None:
    _metadata(images, "metadata.jsonl")


@oddity(Images, slot="labels", only=CLASSIFIERS)
def table_of_images(images: Images) -> None:
    _metadata(images, "images.csv")
    images.files.append(lambda folder: folder / "images.csv")
    images.sure = False


@oddity(Images, slot="split", outcome="works")
def folder_of_a_split(images: Images) -> None:
    images.split = "val"


@oddity(Images, slot="split")
def folders_of_two_splits(images: Images) -> None:
    def add(folder: Path) -> Path:
        shutil.copytree(folder / "val", folder / "train", symlinks=True)
        return folder

    images.split = "val"
    images.files.insert(0, add)


@oddity(Images, slot="split")
def parquet_of_images(images: Images) -> None:
    def write(folder: Path) -> Path:
        import datasets

        files = sorted(file for file in folder.rglob("*") if file.is_file())
        rows = {"image": [{"bytes": file.read_bytes(), "path": file.name} for file in files]}
        if not images.flat:
            rows["label"] = [file.parent.name for file in files]  # type: ignore[misc]
        features = {"image": datasets.Image()} | ({} if images.flat else {"label": datasets.Value("string")})
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(str(folder.parent / "images.parquet"))
        return folder.parent / "images.parquet"

    images.files.append(write)
