"""What is kept outlives a process that is killed, wherever it was, and is used by one at a time."""

import os
import shutil
import threading

import numpy as np
import pytest

from fne_jax.errors import UserError
from fne_jax.index import kept_rows
from fne_jax.index.names import Names
from tests.support.faults import FULL, Operations
from tests.support.index import Dies, Killed, Model, build, build_and_die, pixels_of, write_image

# Of 0.png, 2.png and 7.png, as they are in the end.
PIXELS = [pixels_of(number)[None] for number in (0, 20, 7)]


@pytest.fixture
def changed(tmp_path):
    """A folder of images and its index from before some of them were new, changed or gone."""
    photos, folder = tmp_path / "photos", tmp_path / "before"
    for number in range(3):
        write_image(photos / f"{number}.png", number)
    build(photos, folder)
    (photos / "1.png").unlink()
    write_image(photos / "2.png", 20)
    write_image(photos / "7.png", 7)
    return photos, folder


@pytest.fixture
def begun(changed, tmp_path):
    """Returns a function that begins anew with the index from before; and the operations."""
    photos, before = changed
    folder = tmp_path / "index"

    def begin():
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(before, folder)

    with Operations(begin()) as operations:
        build(photos, folder)
    return begin, operations.done


def assert_goes_on(photos, folder, killed):
    model = Model()
    index = build(photos, folder, model)
    assert index.names == ["0.png", "2.png", "7.png"], killed
    assert sum(model.embedded) <= 2, "what was kept before is never embedded again"
    own = [index.nearest(model.images(pixels), 1)[0].item() for pixels in PIXELS]
    assert own == [0, 1, 2], killed
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ""], killed


def test_after_whatever_operation_a_process_dies_the_next_goes_on(changed, begun):
    photos, _ = changed
    begin, operations = begun
    assert len(operations) > 30
    for after, operation in enumerate(operations):
        folder = begin()
        with Dies(folder, after), pytest.raises(Killed):
            build(photos, folder)
        assert_goes_on(photos, folder, operation)


@pytest.mark.slow
def test_killed_at_any_file_operation_the_next_goes_on(changed, begun):
    photos, _ = changed
    begin, operations = begun
    for operation in operations:
        folder = begin()
        assert build_and_die(photos, folder, operation), operation
        assert_goes_on(photos, folder, operation)


def test_a_disk_that_is_full_is_one_error_and_loses_nothing(changed, begun):
    photos, _ = changed
    begin, operations = begun
    writes = [operation for operation in operations if operation.writes]
    assert len(writes) == 10  # five files of the new rows, five of all
    for operation in writes:
        folder = begin()
        with Operations(folder, operation, FULL), pytest.raises(UserError) as error:
            build(photos, folder)
        assert "the index cannot be kept" in str(error.value) and error.value.exit_code == 74
        assert_goes_on(photos, folder, operation)


def test_many_parts_need_no_open_files(tmp_path):
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    kept, before = kept_rows.KeptRows(tmp_path, {}), open_files()
    rows = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float16)
    for number in range(40):
        kept.add([str(number)], np.zeros((1, 2), np.int64), rows[[number]])
    again = kept_rows.KeptRows(tmp_path, {})
    assert len(again.parts) == 40 and open_files() < before + 10
    order = Names.of(str(number) for number in reversed(range(40)))
    complete = again.complete(order, np.zeros((40, 2), np.int64))
    np.testing.assert_array_equal(complete.open_rows(), rows[::-1])


def test_a_second_process_waits_for_the_first(tmp_path):
    """The lock is of the open file, so threads that open it each are as good as processes."""
    order = []
    with kept_rows.held(tmp_path):
        second = threading.Thread(target=wait_then_note, args=(tmp_path, order))
        second.start()
        second.join(0.2)
        order.append("first")
    second.join(10)
    assert order == ["first", "second"]


def wait_then_note(folder, order):
    with kept_rows.held(folder):
        order.append("second")
