"""Paths and disks that are unusual."""

import os
import subprocess
from pathlib import Path

from .oddity import oddity
from .place import Place


def _all_named(place: Place, name: bytes) -> None:
    place.model, place.data, place.output = b"m" + name, b"d" + name, b"o" + name


@oddity(Place, slot="names")
def paths_not_in_utf8(place: Place) -> None:
    _all_named(place, b"caf\xe9")


@oddity(Place, slot="names", outcome="works")
def data_not_in_utf8(place: Place) -> None:
    place.data = b"caf\xe9"


@oddity(Place, slot="names", outcome="works")
def paths_of_other_scripts(place: Place) -> None:
    _all_named(place, "модель 映画 🙂".encode())


@oddity(Place, slot="names", outcome="works")
def paths_with_blanks(place: Place) -> None:
    _all_named(place, b" a  b ")


@oddity(Place, slot="names", outcome="works")
def paths_with_line_breaks(place: Place) -> None:
    _all_named(place, b"two\nlines")


@oddity(Place, slot="names", outcome="works")
def paths_with_markup(place: Place) -> None:
    _all_named(place, b"[red]<b>'\"&$(x)`;*?")


@oddity(Place, slot="names")
def paths_with_colons(place: Place) -> None:
    _all_named(place, b":train")


@oddity(Place, slot="names", outcome="works")
def paths_with_dots(place: Place) -> None:
    _all_named(place, b".yaml.csv.onnx.")


@oddity(Place, slot="names")
def output_of_250_letters(place: Place) -> None:
    place.output = b"o" * 250


@oddity(Place, slot="names")
def output_with_a_dash(place: Place) -> None:
    place.output = b"-o"


@oddity(Place, slot="names", outcome="works")
def output_that_is_hidden(place: Place) -> None:
    place.output = b".out"


@oddity(Place, slot="names", outcome="works")
def output_with_a_slash(place: Place) -> None:
    place.output = b"new/folders/out"


@oddity(Place, slot="output")
def long_way_to_the_output(place: Place) -> None:
    place.written = "/".join(["d" * 200] * 12)


@oddity(Place, slot="form", outcome="works")
def absolute_paths(place: Place) -> None:
    place.relative = False


@oddity(Place, slot="links", outcome="works")
def linked_model(place: Place) -> None:
    def link(place: Place) -> None:
        model = place.inside(place.model)
        model.rename(place.inside(b"the model itself"))
        model.symlink_to("the model itself")

    place.before.append(link)


@oddity(Place, slot="links", outcome="works")
def linked_data(place: Place) -> None:
    def link(place: Place) -> None:
        data = place.inside(place.data)
        data.rename(place.inside(b"the data themselves"))
        data.symlink_to("the data themselves")

    place.before.append(link)


@oddity(Place, slot="output")
def output_is_a_file(place: Place) -> None:
    place.before.append(lambda place: place.output_path().write_text("mine"))


@oddity(Place, slot="output")
def output_is_a_link(place: Place) -> None:
    place.before.append(lambda place: place.output_path().symlink_to("/does/not/exist"))


@oddity(Place, slot="output")
def output_is_not_empty(place: Place) -> None:
    def fill(place: Place) -> None:
        place.output_path().mkdir(parents=True)
        (place.output_path() / "thesis.txt").write_text("mine")

    place.before.append(fill)


@oddity(Place, slot="output", outcome="works")
def output_is_empty(place: Place) -> None:
    place.before.append(lambda place: place.output_path().mkdir(parents=True))


@oddity(Place, slot="output")
def output_below_a_file(place: Place) -> None:
    place.written = "file"
    place.before.append(lambda place: (place.work / "file").write_text("mine"))


@oddity(Place, slot="output", commands=("compress", "finetune", "quantize", "export"))
def read_only_folder(place: Place) -> None:
    place.unprivileged = True
    place.before.append(lambda place: place.work.chmod(0o555))
    place.after.append(lambda place: place.work.chmod(0o755))


@oddity(Place, slot="output", commands=("compress", "finetune", "quantize", "export"))
def read_only_inputs(place: Place) -> None:
    place.unprivileged = True

    def change(place: Place, folder: int, file: int) -> None:
        for directory, _, files in os.walk(place.inputs):
            Path(directory).chmod(folder)
            for name in files:
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink():
                    path.chmod(file)

    place.before.append(lambda place: change(place, 0o555, 0o444))
    place.after.append(lambda place: change(place, 0o755, 0o644))


def _small_disk(place: Place, size: str) -> None:
    def mount(place: Place) -> None:
        (place.work / "disk").mkdir()
        # where that is not allowed the case is an ordinary one
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place.work / "disk"], check=False, stderr=-3
        )

    def unmount(place: Place) -> None:
        subprocess.run(["umount", place.work / "disk"], check=False, stderr=-3)

    place.written = "disk"
    place.before.append(mount)
    place.after.append(unmount)


@oddity(Place, slot="output")
def disk_of_64_kilobytes(place: Place) -> None:
    _small_disk(place, "64k")


@oddity(Place, slot="output")
def disk_of_200_kilobytes(place: Place) -> None:
    _small_disk(place, "200k")


@oddity(Place, slot="output", outcome="works")
def disk_of_4_megabytes(place: Place) -> None:
    _small_disk(place, "4m")
