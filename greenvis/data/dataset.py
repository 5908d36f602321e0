"""What a data set is: a class with a name, in a file of `greenvis.data.sets` or of an outside
package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from greenvis.data.spec import FOLDER, DataSpec
from greenvis.errors import BadInput, nearest
from greenvis.plugins import Door

if TYPE_CHECKING:
    from greenvis.data.splits import Stored


class DataSet:
    """Images with labels, as a recipe's `data` asks for them: subclasses set what is known before
    anything is read, and write `read`.

    Args:
        spec: What the recipe says.
        folder: What paths in it are relative to.

    Attributes:
        name: As in a recipe; "folder" is written "folder:PATH".
        argument: What stands behind the colon: "PATH" is one of the disk; "" where there is none.
        values: What may stand there, where that is a list.
        source: Where the images come from: an address, or what makes them.
        licence: Of the images, as SPDX writes it; else where it is said.
        checksum: What `Stored.checksum` is for the whole set; None where that hangs on the files.
        size: Images by split, the most there are; {} where that hangs on the files.
        classes: Names, by label; () where they hang on the files.
        options: Which of "root", "download" and "skip_broken" it takes.
    """

    name: ClassVar[str]
    argument: ClassVar[str] = ""
    values: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str]
    licence: ClassVar[str]
    checksum: ClassVar[str | None] = None
    size: ClassVar[Mapping[str, int]] = {}
    classes: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, spec: DataSpec, folder: Path = Path()) -> None:
        self.spec, self.folder = spec, folder
        self.value = spec.name.partition(":")[2]  # of `argument`

    @property
    def most(self) -> Mapping[str, int]:
        """Images by split, the most there are of what is asked for; {} where that hangs on the
        files."""
        return self.size

    @property
    def root(self) -> Path | None:
        """The folder of its files that the recipe names."""
        return self.resolve(self.spec.root) if self.spec.root else None

    def resolve(self, path: str) -> Path:
        """Return a path of the recipe, absolute."""
        return (self.folder / Path(path).expanduser()).resolve()

    def located(self) -> DataSpec:
        """Return what the recipe says, its paths absolute."""
        paths = {}
        if self.argument == "PATH":
            paths["name"] = f"{self.name}:{self.resolve(self.value)}"
        if self.root:
            paths["root"] = str(self.root)
        if below := self.spec.unlabeled_folder:
            paths["unlabeled"] = f"{FOLDER}{self.resolve(below)}"
        return self.spec.model_copy(update=paths)

    def domain(self, name: str) -> DataSet | None:
        """Return the same classes as one of its other domains shows them (another folder, style,
        font); None where it has none of that name."""
        return None

    def check(self) -> None:
        """Look whether it can be read, without reading it.

        Raises:
            BadInput: Where files are missing, with how to get them.
        """

    @classmethod
    def licences(cls) -> Mapping[str, str]:
        """Return the licence of each of its `values`, where they differ."""
        return {}

    def fetch(self) -> Path:
        """Fetch its files, into `root` or the user's cache folder.

        Returns:
            The folder they lie in.

        Raises:
            BadInput: Where there is nothing to fetch, and where fetching fails, with what to do.
        """
        self.check()
        raise BadInput(f"'{self.spec.name}' is here: there is nothing to fetch")

    def read(self) -> Stored:
        """Read all of it; large images are better left unread, as `images.lazy` does.

        Raises:
            BadInput: As `check` does, and for files that are broken.
        """
        raise NotImplementedError


DOOR = Door("data set", DataSet, "greenvis.data.sets", "greenvis.datasets", separator="-")


def find(spec: DataSpec, folder: str | Path = ".") -> DataSet:
    """Return the data set that a recipe names.

    Args:
        spec: What the recipe says.
        folder: What paths in it are relative to.

    Raises:
        BadInput: For a name that is none, with the nearest, and for options it does not take.
    """
    name, _, value = spec.name.partition(":")
    cls = DOOR.find(name)
    if bool(value) != bool(cls.argument):
        form = f"{name}:{cls.argument}" if cls.argument else name
        raise BadInput(f"unknown data set '{spec.name}'{nearest(form, [form])}")
    set_options = {
        "root": spec.root is not None,
        "download": spec.download,
        "skip_broken": spec.skip_broken,
    }
    idle = [
        option for option, is_set in set_options.items() if is_set and option not in cls.options
    ]
    if idle:
        raise BadInput(
            f"data: '{spec.name}' takes no {' and no '.join(idle)}, which would change nothing; "
            "leave it out"
        )
    return cls(spec, Path(folder))
