"""The walk over the lists of a COCO file, shared by reading, scoring, validation and repair. Torch-free.

``walk`` yields the entries of one list with their place for messages, for example ``train.json: annotation 17``. The
functions below check one field of an entry and return its value. Each raises DataError for the first broken rule; what
happens then is the caller's policy: reading lets the error pass, validation collects it (``Report.check``), and repair
corrects or drops the entry. For an entry without a valid id, ``walk`` itself applies the policy ``on_error``.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from pais_ray.data.validation import entries, values
from pais_ray.data.validation.rules import LIMITS, DataError, Limits, short_repr

Json = dict[str, Any]

# Called with the broken rule and the value in the list. Returns the entry to continue with, None to leave it out, or
# raises an exception to end the walk.
OnError = Callable[[DataError, object], Json | None]


class Entry(NamedTuple):
    """An image, a category or an annotation of a COCO file."""

    value: Json
    place: str  # for messages

    @property
    def id(self) -> int:
        entry_id: int = self.value["id"]
        return entry_id

    def in_image(self, image_id: int) -> "Entry":
        """The same entry; its place names the image as well."""
        return Entry(self.value, f"{self.place} (image {image_id})")


def raise_error(error: DataError, value: object) -> NoReturn:
    """The policy of reading: the first broken rule ends the walk."""
    raise error


def keep_annotation(error: DataError, value: object) -> Json:
    """The policy of scoring, where annotations are renumbered: any id is accepted, also none. Raises DataError if the
    entry is not an object."""
    if not isinstance(value, dict):
        raise error
    return value


def walk(listed: Sequence[Any], kind: str, path: str, on_error: OnError = raise_error) -> Iterator[Entry]:
    """Yields the entries of a list of the file ``path``; ``kind`` is "image", "category" or "annotation".

    Ids must be unique 64-bit integers.
    """
    seen: set[int] = set()
    for position, value in enumerate(listed):
        try:
            entry_id = entries.check_id(value, kind, path, seen)
            seen.add(entry_id)
            place = f"{path}: {kind} {entry_id}"
        except DataError as error:
            value = on_error(error, value)
            if value is None:
                continue
            if type(value.get("id")) is int:
                seen.add(value["id"])
            place = f"{path}: {kind} {short_repr(value.get('id', position))}"
        yield Entry(value, place)


def category_name(entry: Entry) -> str:
    """Returns the name, which must not be empty."""
    return entries.check_text(entry.value, "name", entry.place)


def image_size(entry: Entry, limits: Limits = LIMITS) -> tuple[int, int]:
    """Returns the (height, width) of the upright image, px."""
    height = entries.check_value(entry.value, "height", entry.place)
    width = entries.check_value(entry.value, "width", entry.place)
    return values.check_size(height, width, entry.place, limits)


def image_name(entry: Entry) -> str:
    """Returns the file name, which must be relative and must not leave the image folder."""
    return entries.check_name(entries.check_text(entry.value, "file_name", entry.place), entry.place)


def image_file(entry: Entry, folder: str) -> str:
    """Returns the path of the image file, which must exist inside ``folder``."""
    return entries.find_image(folder, entries.check_text(entry.value, "file_name", entry.place), entry.place)


def image_id(entry: Entry, known: Collection[int]) -> int:
    """Returns the id of the image that an annotation belongs to, one of ``known``."""
    return entries.check_reference(entry.value, "image", known, entry.place)


def category_id(entry: Entry, known: Collection[int]) -> int:
    """Returns the id of the category that an annotation belongs to, one of ``known``."""
    return entries.check_reference(entry.value, "category", known, entry.place)


def is_crowd(entry: Entry) -> bool:
    """Returns the ``iscrowd`` flag of an annotation; a missing flag means no crowd."""
    return values.check_crowd(entry.value.get("iscrowd", 0), entry.place)


def segmentation(entry: Entry, size: tuple[int, int] | None) -> Any:
    """Returns the polygons or the RLE of an annotation in an image of ``size``; None if the size is not known, and
    then only the presence of the key is checked."""
    value = entries.check_value(entry.value, "segmentation", entry.place)
    if size is not None:
        values.check_segmentation(value, *size, entry.place)
    return value


def box(entry: Entry) -> tuple[float, float, float, float]:
    """Returns the box (x, y, width, height) of an annotation, px."""
    return values.check_box(entries.check_value(entry.value, "bbox", entry.place), entry.place)


def area(entry: Entry) -> float | None:
    """Returns the area of an annotation in px, None if it has none."""
    return values.check_area(entry.value.get("area"), entry.place)
