"""SECURITY.md: each promise, in its own words, beside the tests that hold it."""

import ast
import re

import pytest

from utils import tensors
from utils.data import images
from utils.files import ROOT
from utils.plain import LARGEST

TEXT = " ".join((ROOT / "SECURITY.md").read_text(encoding="utf-8").split())

# Words of a promise -> the tests that hold it, as file: names.
PROMISES: dict[str, dict[str, tuple[str, ...]]] = {
    "takes no more memory than twice the size of the file plus 1 GiB": {
        "test_tensors": (
            "test_hostile_pickles_take_neither_memory_nor_time",
            "test_a_large_file_takes_little_more_than_its_size",
        ),
        "test_images": ("test_pictures_of_88_million_pixels_take_less_than_a_gigabyte",),
        "test_fuzz": ("test_damaged_files_are_read_or_refused",),
    },
    "No pickle is run and `torch.load` is not called": {
        "test_tensors": ("test_no_pickle_is_run_anywhere",),
        "test_traps": ("test_a_record", "test_the_checkpoint_of_an_interrupted_run"),
    },
    "archives that are compressed or claim more than they hold": {
        "test_tensors": (
            "test_a_compressed_archive_is_refused",
            "test_archives_that_claim_too_much_are_refused",
            "test_an_archive_of_two_lists_is_read_by_one_reader",
        )
    },
    "tensors of more values than are stored": {
        "test_tensors": ("test_a_tensor_is_a_view_of_what_is_stored",)
    },
    "nested too deeply or become much larger when they are read": {
        "test_tensors": ("test_lists_that_unfold_are_refused",)
    },
    "each file is checked against one schema when it is opened": {
        "test_record": (
            "test_poison_of_another_type_or_shape_is_refused",
            "test_poison_out_of_range_is_refused",
            "test_poison_of_another_dataset_is_refused",
            "test_plain_values_out_of_range_are_refused",
        )
    },
    "A network is made only for weights that fit it": {
        "test_record": ("test_a_network_is_made_only_for_weights_that_fit",)
    },
    "a state is put into an object only if such an object could have written it": {
        "test_state": (
            "test_another_state_is_refused_before_it_is_loaded",
            "test_a_scheduler_takes_no_other_attributes",
            "test_global_generators_take_states_of_their_own_alone",
            "test_a_loop_takes_its_own_snapshot_alone",
        )
    },
    "A run continues only if these are the same as at its start": {
        "test_resume_origin": (
            "test_a_checkpoint_of_another_run",
            "test_images_or_labels_that_were_changed",
            "test_a_trigger_s_picture_that_was_changed",
            "test_an_index_file_that_was_changed",
            "test_an_attack_that_was_run_again",
            "test_an_emptied_configuration_is_written_again",
        )
    },
    "If the number of threads, the device or the precision differs, one line says so": {
        "test_resume_origin": ("test_another_number_of_threads_is_said",)
    },
    "No other format is opened, and no program is started": {
        "test_images": ("test_other_formats_are_not_opened",)
    },
    "Pipes, devices, and links to them are refused": {
        "test_tensors": ("test_only_regular_files_of_sane_size_are_opened",),
        "test_record": ("test_what_is_no_file_is_refused_at_once",),
        "test_images": ("test_what_is_no_file_is_refused_at_once",),
    },
    "are shown through one function, in one line": {
        "test_names": (
            "test_a_name_is_part_of_one_line",
            "test_a_figure_takes_any_name_and_says_nothing",
            "test_a_cell_is_one_cell",
            "test_a_report_takes_any_name",
        )
    },
    "Nothing outside of the record and `data/` is written because a record says so": {
        "test_record": ("test_nothing_is_written_where_a_record_says_so",)
    },
    "The code that runs is exactly the code that was hashed": {
        "test_userfile": ("test_what_ran_is_what_the_sha256_is_of",),
    },
    "the message names your file and the line, and the run never counts as a success": {
        "test_userfile": (
            "test_the_trial_tells_whatever_is_raised",
            "test_what_is_raised_later_is_one_line_and_leaves_no_record",
            "test_a_process_does_not_end_well",
        ),
    },
    "Files that `run.json` does not list are never removed": {
        "test_contents": (
            "test_a_folder_of_the_user_is_never_touched",
            "test_a_foreign_file_anywhere_in_a_record_keeps_all_of_it",
        ),
        "test_wrong_use": (
            "test_a_folder_of_the_user_s_own",
            "test_a_file_of_the_user_s_in_a_record",
        ),
    },
    "while this folder, and the defenses inside it, are locked": {
        "test_wrong_use": (
            "test_a_second_run_that_waits_for_the_first",
            "test_an_attack_does_not_replace_a_record_in_which_a_defense_runs",
            "test_a_defense_does_not_begin_in_a_record_that_is_replaced",
        ),
        "test_interop": ("test_of_three_exports_at_once_one_is_done",),
    },
    "A run can be killed at any change of the disk, and continues": {
        "test_stress": ("test_a_sample_of_the_matrix_gives_the_same_files",)
    },
}


def functions_of(name: str) -> set[str]:
    (path,) = (ROOT / "tests").rglob(f"{name}.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("words", PROMISES)
def test_each_promise_stands_there_and_is_held(words: str) -> None:
    assert words in TEXT
    for name, tests in PROMISES[words].items():
        assert set(tests) <= functions_of(name)


def test_each_paragraph_names_tests_that_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)`", TEXT)
    assert len(named) >= 15
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(named) <= files


def test_the_numbers_are_those_of_the_program() -> None:
    assert f"more than {images.MOST_PIXELS // 10**6} million pixels" in TEXT
    assert images._HUNGRY == ("WEBP", "JPEG2000")
    assert f"files over {LARGEST >> 10} KiB" in TEXT
    formats = "JPEG, PNG, BMP, PPM, WebP, TIFF, GIF, TGA and JPEG 2000"
    assert formats in TEXT
    names = formats.replace(" and ", ", ").split(", ")
    assert {name.upper().replace(" ", "") for name in names} == set(images._FORMATS)
    assert "some forty operations and about twenty names" in TEXT
    types = {("torch", name) for name in (*tensors._STORAGES, *tensors._DTYPES)}
    assert len({*tensors._NAMES, *tensors._NUMPY_NAMES} - types) in range(15, 26)
