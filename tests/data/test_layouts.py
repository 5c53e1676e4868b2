"""Layouts: which files make a case, and what a person is told when they do not."""

import contextlib
import importlib
import json
import os
import shutil
import tempfile
import types
import zlib
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
from hypothesis import strategies as st

import configs.brats
from entrust_jax.data import cases, dataset, layouts, manifest, splits
from entrust_jax.errors import UserError

FOUR = ("T1", "T1ce", "T2", "FLAIR")


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def nnunet(folder: Path, channels: object, *names: str, **more: object) -> None:
    touch(folder / "imagesTr", *names)
    (folder / "labelsTr").mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({"channel_names": channels, **more}))


def test_brats_2021_folders(tmp_path):
    for name in ("B_2", "B_1"):
        touch(tmp_path / name, *(f"{name}_{m}.nii.gz" for m in ("t1", "t1ce", "t2", "flair", "seg")))
    (tmp_path / "B_2" / "B_2_t2.nii.gz").unlink()
    touch(tmp_path, "survival.csv")
    touch(tmp_path / "notes", "readme.txt")
    first, second = layouts.find_cases("brats", tmp_path, FOUR)
    assert (first.name, first.patient, first.number) == ("B_1", "B_1", zlib.crc32(b"B_1") & 0x7FFFFFFF)
    assert first.images["T1"].name == "B_1_t1.nii.gz" and first.images["T1ce"].name == "B_1_t1ce.nii.gz"
    assert first.label is not None and first.label.name == "B_1_seg.nii.gz"
    assert set(second.images) == {"T1", "T1ce", "FLAIR"}


def test_brats_sessions_of_meningioma_radiotherapy_share_a_patient_and_their_labels_are_gtv(tmp_path):
    for name in ("BraTS-MEN-RT-0001-1", "BraTS-MEN-RT-0001-2", "BraTS-MEN-RT-0012-1"):
        touch(tmp_path / name, f"{name}_t1c.nii.gz", f"{name}_gtv.nii.gz")
    cases = layouts.find_cases("brats", tmp_path, ("T1ce",))
    assert [case.patient for case in cases] == ["BraTS-MEN-RT-0001"] * 2 + ["BraTS-MEN-RT-0012"]
    assert all(case.label is not None and "gtv" in case.label.name for case in cases)


def test_cases_one_folder_further_down_are_pointed_at(tmp_path):
    for grade in ("HGG", "LGG"):
        touch(tmp_path / "BraTS2019" / grade / "B_1", "B_1_t1.nii.gz")
    (tmp_path / "BraTS2019" / "A_empty").mkdir()
    for number in range(9):
        touch(tmp_path / "many" / f"part{number}" / f"B_{number}", f"B_{number}_t1.nii.gz")
    with pytest.raises(UserError, match=r"but folders in it do: part0, part1, part2, \.\.\.; give one"):
        layouts.find_cases("brats", tmp_path / "many", ("T1",))
    with pytest.raises(UserError, match=r"BraTS2019: holds no case with any of T1; but folders in it do: HGG, LGG;"):
        layouts.find_cases("brats", tmp_path / "BraTS2019", ("T1",))
    with pytest.raises(UserError, match="the brats layout expects"):
        layouts.find_cases("brats", tmp_path, ("T1",))


def test_a_number_of_a_patient_is_no_session(tmp_path):
    for name in ("Patient-001", "Patient-002", "UCSF-PDGM-0004-001"):
        touch(tmp_path / name, f"{name}-t1n.nii.gz")
    patients = [case.patient for case in layouts.find_cases("brats", tmp_path, ("T1",))]
    assert patients == ["Patient-001", "Patient-002", "UCSF-PDGM-0004"]


def test_brats_2023_time_points_share_a_patient(tmp_path):
    for name in ("BraTS-GLI-00002-000", "BraTS-GLI-00002-001"):
        touch(tmp_path / name, *(f"{name}-{m}.nii.gz" for m in ("t1n", "t1c", "t2w", "t2f", "seg")))
    cases = layouts.find_cases("brats", tmp_path, FOUR)
    assert [case.patient for case in cases] == ["BraTS-GLI-00002"] * 2
    assert cases[0].number != cases[1].number
    assert {m: p.name[20:] for m, p in cases[1].images.items()} == {
        "T1": "t1n.nii.gz",
        "T1ce": "t1c.nii.gz",
        "T2": "t2w.nii.gz",
        "FLAIR": "t2f.nii.gz",
    }


def test_nnunet_matches_channels_by_name_in_any_case(tmp_path):
    names = [f"P_{c}_000{i}.nii.gz" for c in "ab" for i in range(3)]
    nnunet(tmp_path, {"0": "T1", "1": "FLAIR", "2": "T1ce"}, *names[:-1])
    touch(tmp_path / "labelsTr", "P_a.nii.gz")
    a, b = layouts.find_cases("nnunet", tmp_path, ("flair", "T1CE"))
    assert (a.name, b.name) == ("P_a", "P_b")
    assert {m: p.name for m, p in a.images.items()} == {"flair": "P_a_0001.nii.gz", "T1CE": "P_a_0002.nii.gz"}
    assert set(b.images) == {"flair"} and b.label is None and a.label is not None


def test_nnunet_file_ending(tmp_path):
    nnunet(tmp_path, {"0": "CT"}, "x_0000.nii", file_ending=".nii")
    (case,) = layouts.find_cases("nnunet", tmp_path, ("CT",))
    assert case.name == "x" and case.images["CT"].name == "x_0000.nii"


def test_number_is_stable_and_fits_int32():
    assert layouts.case_number("BraTS2021_00000") == zlib.crc32(b"BraTS2021_00000") & 0x7FFFFFFF
    assert all(0 <= layouts.case_number(str(i)) < 2**31 for i in range(1000))


def test_missing_folder_names_it_and_the_layout(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder.*config\.data\.dir.*nnunet layout"):
        layouts.find_cases("nnunet", tmp_path / "nowhere", ("T1",))


def test_unknown_layout():
    with pytest.raises(UserError, match=r"config\.data\.layout is 'dicom'.*brats, nnunet"):
        layouts.find_cases("dicom", ".", ("T1",))


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="holds no case with any of T1, T1ce"):
        layouts.find_cases("brats", tmp_path, FOUR)


def test_no_complete_case_names_the_mend(tmp_path):
    for name in ("a", "b"):
        touch(tmp_path / name, f"{name}_flair.nii.gz", f"{name}_t1ce.nii.gz")
    with pytest.raises(UserError, match=r"lack T1, T2; set config\.data\.modalities.*present: T1ce, FLAIR") as e:
        layouts.require_complete(layouts.find_cases("brats", tmp_path, FOUR), tmp_path, FOUR)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    assert len(layouts.find_cases("brats", tmp_path, ("FLAIR", "T1ce"))) == 2


def test_no_complete_case_though_each_modality_is_somewhere(tmp_path):
    touch(tmp_path / "a", "a_flair.nii.gz")
    touch(tmp_path / "b", "b_t1.nii.gz")
    with pytest.raises(UserError, match="none of its 2 cases has every modality; add the missing files"):
        found = layouts.find_cases("brats", tmp_path, ("FLAIR", "T1"))
        layouts.require_complete(found, tmp_path, ("FLAIR", "T1"))


def test_endings_in_any_case_and_no_hidden_files(tmp_path):
    touch(tmp_path / "a", "a_T1.NII.GZ", "a_flair.Nii.gz", "._a_t1.nii.gz", "._a_flair.nii.gz")
    (case,) = layouts.find_cases("brats", tmp_path, ("T1", "FLAIR"))
    assert {name: path.name for name, path in case.images.items()} == {"T1": "a_T1.NII.GZ", "FLAIR": "a_flair.Nii.gz"}


def test_endings_in_any_case_in_nnunet_folders(tmp_path):
    nnunet(tmp_path, {"0": "T1", "1": "FLAIR"}, "p_0000.nii.gz", "p_0001.NII.GZ", "._p_0000.nii.gz")
    touch(tmp_path / "labelsTr", "p.NII.GZ", "._p.nii.gz")
    (case,) = layouts.find_cases("nnunet", tmp_path, ("T1", "FLAIR"))
    assert set(case.images) == {"T1", "FLAIR"} and case.label is not None and case.label.name == "p.NII.GZ"


@pytest.mark.parametrize("second", ["a_t1.nii", "a_t1n.nii.gz", "other_t1.nii.gz"])
def test_two_files_for_one_modality(tmp_path, second):
    touch(tmp_path / "a", "a_t1.nii.gz", second)
    with pytest.raises(UserError, match="two files for T1") as error:
        layouts.find_cases("brats", tmp_path, ("T1",))
    assert second in str(error.value) and "a_t1.nii.gz" in str(error.value)


def test_two_files_for_one_channel_or_label(tmp_path):
    nnunet(tmp_path, {"0": "T1"}, "p_0000.nii.gz", "p_0000.nii")
    with pytest.raises(UserError, match=r"two files for T1: p_0000\.nii and p_0000\.nii\.gz"):
        layouts.find_cases("nnunet", tmp_path, ("T1",))
    (tmp_path / "imagesTr" / "p_0000.nii").unlink()
    touch(tmp_path / "labelsTr", "p.nii.gz", "p.nii")
    with pytest.raises(UserError, match="two files for the label"):
        layouts.find_cases("nnunet", tmp_path, ("T1",))


def test_unknown_channel_lists_what_there_is(tmp_path):
    nnunet(tmp_path, {"0": "T1", "1": "FLAIR"}, "p_0000.nii.gz")
    with pytest.raises(UserError, match=r"dataset\.json: has no channel PET, it has T1, FLAIR"):
        layouts.find_cases("nnunet", tmp_path, ("PET",))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"channel_names": {"T1": 0}}'])
def test_damaged_dataset_json(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json"):
        layouts.find_cases("nnunet", tmp_path, ("T1",))


def test_case_from_folder(tmp_path, monkeypatch):
    touch(tmp_path / "c", "c_flair.nii.gz")
    monkeypatch.chdir(tmp_path / "c")
    for folder in (tmp_path / "c", "."):
        case = layouts.case_from_folder(folder, FOUR)
        assert case.name == "c" and set(case.images) == {"FLAIR"} and case.label is None
    with pytest.raises(UserError, match="none of PET"):
        layouts.case_from_folder(tmp_path / "c", ("PET",))
    with pytest.raises(UserError, match="no such folder"):
        layouts.case_from_folder(tmp_path / "d", FOUR)
    touch(tmp_path / "c", "c_seg.nii", "c_seg.nii.gz")  # two masks, of which none is needed
    assert layouts.case_from_folder(tmp_path / "c", FOUR).label is None
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "1.dcm").write_bytes(b"")
    with pytest.raises(UserError, match="dcm2niix"):
        layouts.case_from_folder(tmp_path / "series", FOUR)


def test_case_from_files(tmp_path):
    touch(tmp_path, "f.nii.gz", "t.nii.gz")
    files = {"flair": tmp_path / "f.nii.gz", "T1": str(tmp_path / "t.nii.gz")}
    case = layouts.case_from_files(files, FOUR)
    assert list(case.images) == ["T1", "FLAIR"] and case.name == "t" and case.label is None
    for bad, message in (
        ({"PET": "x"}, "no modality PET"),
        ({"T1": tmp_path / "gone.nii.gz"}, r"gone\.nii\.gz: no such file"),
        ({}, "no scan given"),
        ({"T1": tmp_path / "t.nii.gz", "t1": tmp_path / "f.nii.gz"}, "two files for T1"),
    ):
        with pytest.raises(UserError, match=message):
            layouts.case_from_files(bad, FOUR)


def test_real_glioma_set(data_root):
    folder = data_root / "Dataset101_LowerGradeGlioma"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    cases = layouts.find_cases("nnunet", folder, ("T1", "FLAIR", "T1ce"))
    assert len(cases) == 61 and len({case.number for case in cases}) == 61
    assert all(case.label for case in cases)
    assert sum("T1ce" not in case.images for case in cases) == 4
    assert sum("T1" not in case.images for case in cases) == 1


def test_real_brats_set_lacks_two_modalities(data_root):
    folder = data_root / "brats13"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    with pytest.raises(UserError, match="lack T1, T2"):
        layouts.require_complete(layouts.find_cases("brats", folder, FOUR), folder, FOUR)
    cases = layouts.find_cases("brats", folder, ("FLAIR", "T1ce"))
    assert len(cases) == 3 and all(set(case.images) == {"FLAIR", "T1ce"} and case.label for case in cases)


def test_case_from_files_is_named_as_in_its_data_set(tmp_path):
    for first in ("LGG_1_0001.nii.gz", "LGG_1_flair.nii.gz", "LGG_1-FLAIR.nii.gz"):
        (tmp_path / first).write_bytes(b"")
        case = layouts.case_from_files({"FLAIR": tmp_path / first}, FOUR)
        assert case.name == "LGG_1" and case.number == layouts.case_number("LGG_1")
    (tmp_path / "_0001.nii.gz").write_bytes(b"")
    assert layouts.case_from_files({"FLAIR": tmp_path / "_0001.nii.gz"}, FOUR).name == "_0001"


def test_bids_as_isles_ships_it(tmp_path):
    for number, session in (("0001", "0001"), ("0001", "0002"), ("0007", "0001")):
        name = f"sub-strokecase{number}_ses-{session}"
        folder = tmp_path / "rawdata" / f"sub-strokecase{number}" / f"ses-{session}"
        touch(folder / "dwi", f"{name}_dwi.nii.gz", f"{name}_adc.nii.gz", f"{name}_dwi.json")
        touch(folder / "anat", f"{name}_acq-iso_FLAIR.nii.gz")
        derived = tmp_path / "derivatives" / f"sub-strokecase{number}" / f"ses-{session}"
        touch(derived, f"{name}_msk.nii.gz", f"{name}_space-T1w_FLAIR.nii.gz", f"{name}_desc-brain_mask.nii.gz")
    one, two, seven = layouts.find_cases("bids", tmp_path, ("DWI", "ADC", "FLAIR"))
    assert [case.name for case in (one, two)] == ["sub-strokecase0001_ses-0001", "sub-strokecase0001_ses-0002"]
    assert one.patient == two.patient == "sub-strokecase0001" != seven.patient
    assert {m: p.name for m, p in one.images.items()} == {
        "DWI": "sub-strokecase0001_ses-0001_dwi.nii.gz",
        "ADC": "sub-strokecase0001_ses-0001_adc.nii.gz",
        "FLAIR": "sub-strokecase0001_ses-0001_acq-iso_FLAIR.nii.gz",
    }
    assert one.label is not None and one.label.name == "sub-strokecase0001_ses-0001_msk.nii.gz"


def test_bids_without_sessions_or_rawdata_and_with_two_runs(tmp_path):
    touch(tmp_path / "sub-a" / "anat", "sub-a_T1w.nii.gz", "sub-a_T2w.nii.gz")
    (case,) = layouts.find_cases("bids", tmp_path, ("T1", "T2"))
    assert (case.name, case.patient, set(case.images)) == ("sub-a", "sub-a", {"T1", "T2"})
    touch(tmp_path / "sub-a" / "anat", "sub-a_ce-gadolinium_T1w.nii.gz")
    touch(tmp_path / "derivatives" / "x", "sub-a_desc-brain_mask.nii.gz", "sub-a_label-lesion_mask.nii.gz")
    (case,) = layouts.find_cases("bids", tmp_path, ("T1", "T1ce"))
    assert case.images["T1"].name == "sub-a_T1w.nii.gz" and "_ce-" in case.images["T1ce"].name
    assert case.label is not None and case.label.name == "sub-a_label-lesion_mask.nii.gz"
    touch(tmp_path / "sub-a" / "anat", "sub-a_run-2_T1w.nii.gz")
    with pytest.raises(UserError, match=r"case sub-a has two files for T1: sub-a_T1w.* and sub-a_run-2_T1w"):
        layouts.find_cases("bids", tmp_path, ("T1", "T2"))


def test_hecktor_2022(tmp_path):
    touch(tmp_path / "imagesTr", "MDA-001__CT.nii.gz", "MDA-001__PT.nii.gz", "CHUM-002__CT.nii.gz")
    touch(tmp_path / "labelsTr", "MDA-001.nii.gz")
    first, second = layouts.find_cases("hecktor", tmp_path, ("PET", "CT"))
    assert first.name == first.patient == "CHUM-002" and set(first.images) == {"CT"} and first.label is None
    assert {m: p.name for m, p in second.images.items()} == {"PET": "MDA-001__PT.nii.gz", "CT": "MDA-001__CT.nii.gz"}
    assert second.label is not None and second.label.name == "MDA-001.nii.gz"


def test_myops_2020_with_labels_in_a_folder_of_their_own(tmp_path):
    for kind in ("C0", "DE", "T2"):
        touch(tmp_path / "train25", f"myops_training_101_{kind}.nii.gz")
    touch(tmp_path / "train25_myops_gd", "myops_training_101_gd.nii.gz")
    (case,) = layouts.find_cases("myops", tmp_path, ("bSSFP", "LGE", "T2"))
    assert case.name == "myops_training_101" and case.label is not None
    assert [path.name[19:] for path in case.images.values()] == ["C0.nii.gz", "DE.nii.gz", "T2.nii.gz"]
    assert layouts.find_cases("myops", tmp_path, ("C0", "DE", "T2"))[0].images["DE"] == case.images["LGE"]


def test_the_test_set_beside_the_training_set_is_in_no_part(tmp_path):
    for i in range(10):
        touch(tmp_path / "train25", *(f"myops_training_{i}_{kind}.nii.gz" for kind in ("C0", "DE", "T2")))
        touch(tmp_path / "train25_myops_gd", f"myops_training_{i}_gd.nii.gz")
        touch(tmp_path / "test20", *(f"myops_test_{i}_{kind}.nii.gz" for kind in ("C0", "DE", "T2")))
    cases = layouts.find_cases("myops", tmp_path, ("C0", "DE", "T2"))
    split = types.SimpleNamespace(seed=0, folds=5, fold=0, test_pattern="")
    draw = splits.plan(cases, split)
    assert len(cases) == 20 and all("training" in name for part in draw.parts.values() for name in part)
    (line,) = draw.lines
    assert "10 cases (myops_test_0, myops_test_1, myops_test_2, ...)" in line and "no label" in line


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("name", ["IM001.dcm", "IM001", "MR.1.2.840.215519"])
def test_a_dicom_folder_is_told_how_to_become_nifti(tmp_path, layout, name):
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / name).write_bytes(b"" if name.endswith("dcm") else b"\0" * 128 + b"DICM")
    with pytest.raises(UserError, match=r"is a DICOM file; convert .* dcm2niix") as error:
        layouts.find_cases(layout, tmp_path, FOUR)
    assert name in str(error.value)


def test_thousands_of_dicom_files_and_a_mask_beside_them_hide_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "MOST_FILES", 20)
    touch(tmp_path / "P1" / "series", *(f"IM{i:03d}.dcm" for i in range(30)))
    with pytest.raises(UserError, match=r"^\S+IM000\.dcm: is a DICOM file; convert .* dcm2niix"):
        layouts.find_cases("brats", tmp_path, ("T1",))
    touch(tmp_path / "P1", "P1_seg.nii.gz")
    with pytest.raises(UserError, match=r"holds no case with any of T1; .*; and \S+IM000\.dcm: is a DICOM file; conv"):
        layouts.find_cases("brats", tmp_path, ("T1",))
    with pytest.raises(UserError, match=r"holds none of T1; .*; and \S+IM000\.dcm: is a DICOM file"):
        layouts.case_from_folder(tmp_path / "P1", ("T1",))


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("brats", "a/a_t1"),
        ("nnunet", "imagesTr/a_0000"),
        ("bids", "sub-a/sub-a_T1w"),
        ("hecktor", "imagesTr/a__T1"),
        ("myops", "train25/a_T1"),
    ],
)
def test_a_link_to_nothing_and_formats_that_are_not_read_are_no_missing_files(tmp_path, layout, file):
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "T1", "1": "FLAIR"}}')
    path = tmp_path / f"{file}.nii.gz"
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(tmp_path / ".git" / "annex" / "x.nii.gz")
    with pytest.raises(
        UserError, match=r"T1 of case \S+ is a link to nothing; get the file \(git annex get, data"
    ) as e:
        layouts.find_cases(layout, tmp_path, ("T1",))
    assert str(e.value).startswith(str(path))
    path.unlink()
    for ending in (".nrrd", ".mha", ".mhd", ".mgz", ".hdr"):
        touch(path.parent, f"{path.name[:-7]}{ending}")
        with pytest.raises(UserError, match=rf"{ending}: T1 of case \S+ is {ending}, a format .* convert it to NIfTI"):
            layouts.find_cases(layout, tmp_path, ("T1",))
        (path.parent / f"{path.name[:-7]}{ending}").unlink()
    # Beside a file that is read they are nothing.
    touch(path.parent, path.name, f"{path.name[:-7]}.nrrd")
    (path.parent / f"{path.name[:-7]}.nii").symlink_to(tmp_path / "gone")
    assert layouts.find_cases(layout, tmp_path, ("T1",))[0].images == {"T1": path}


def test_a_folder_of_another_format_alone_is_told_to_convert(tmp_path):
    touch(tmp_path / "a", "scan_one.nrrd")
    with pytest.raises(UserError, match=r"scan_one\.nrrd: is \.nrrd, a format that is not read; convert it to NIfTI"):
        layouts.find_cases("brats", tmp_path, ("T1",))


def test_a_link_to_another_cases_file_is_that_file(tmp_path):
    for name in "ab":
        touch(tmp_path / name, f"{name}_t1.nii.gz", f"{name}_seg.nii.gz")
    (tmp_path / "b" / "b_seg.nii.gz").unlink()
    (tmp_path / "b" / "b_seg.nii.gz").symlink_to(tmp_path / "a" / "a_seg.nii.gz")
    listing = layouts.list_cases("brats", tmp_path, ("T1",))
    assert [case.label for case in listing.cases] == [None, None]
    (mistake,) = listing.mistakes
    assert f"a_seg.nii.gz: is a file of case a and, as {tmp_path}/b/b_seg.nii.gz, of case b" in mistake.text


def test_channels_are_found_under_their_other_names(tmp_path):
    nnunet(tmp_path, {"0": "T1w", "1": "T2-FLAIR", "2": "T1c"}, "p_0000.nii.gz", "p_0002.nii.gz")
    (case,) = layouts.find_cases("nnunet", tmp_path, ("T1", "T1ce"))
    assert [path.name for path in case.images.values()] == ["p_0000.nii.gz", "p_0002.nii.gz"]


def test_real_isles_case(data_root):
    folder = data_root / "isles22"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    (case,) = layouts.find_cases("bids", folder, ("DWI", "ADC", "FLAIR"))
    assert case.patient == "sub-strokecase0009" and len(case.images) == 3 and case.label is not None


def test_real_sets_listed_by_a_table(data_root):
    for folder, count, files in (
        ("sarcoma_pet_ct_mr", 16, {"PET": "PET_image", "CT": "CT_image", "T1": "MR_T1_image", "label": "MR_T1_mask"}),
        ("ms_lesions_mni", 2, {name: name for name in ("T1", "T1POST", "T2", "FLAIR")} | {"label": "lesion"}),
    ):
        if not (data_root / folder).is_dir():
            pytest.skip(f"no {data_root / folder}")
        rows = manifest.collect(data_root / folder, {name: f"{{case}}/{stem}.nii.gz" for name, stem in files.items()})
        assert len(rows) == count and all({"case", *files} <= set(row) for row in rows)


# --- further names, mistakes, time points -------------------------------------------------------------------


def test_time_points_of_brats_2024_stay_in_one_part(tmp_path):
    config = configs.brats.get_config("gli2024")
    for patient in range(12):
        for time in ("100", "101"):
            name = f"BraTS-GLI-{patient:05d}-{time}"
            touch(tmp_path / name, *(f"{name}-{m}.nii.gz" for m in ("t1n", "t1c", "t2w", "t2f", "seg")))
    data = config.data.copy_and_resolve_references()
    data.dir = str(tmp_path)
    cases = dataset.find(data)
    assert len(cases) == 24 and all(len(case.images) == 4 and case.label for case in cases)
    parts = dataset.drawn(data, cases).parts
    for names in parts.values():
        assert len(names) == 2 * len({name[:15] for name in names})
    assert data.classes == ("background", "NETC", "SNFH", "ET", "RC")
    assert data.label_map == tuple((value, value) for value in range(5))
    regions = {name: tuple(data.classes[index] for index in own) for name, own in data.regions.items()}
    assert regions["TC"] == ("NETC", "ET") and regions["WT"] == ("NETC", "SNFH", "ET") and regions["RC"] == ("RC",)


def test_the_odd_label_of_brats_2020(tmp_path):
    touch(tmp_path / "BraTS20_Training_355", "BraTS20_Training_355_t1.nii", "W39_1998.09.19_Segm.nii")
    (case,) = layouts.find_cases("brats", tmp_path, ("T1",))
    assert case.label is not None and case.label.name == "W39_1998.09.19_Segm.nii"


NAMES = {"T1": ("T1_MPRAGE", "mprage", "acq-mprage_T1w"), "FLAIR": ("dark-fluid",)}


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        ("brats", ["a/a_T1_MPRAGE.nii.gz", "a/a_dark-fluid.nii.gz", "a/a_seg.nii.gz"]),
        ("bids", ["sub-a/sub-a_acq-mprage_T1w.nii.gz", "sub-a/sub-a_FLAIR.nii.gz", "derivatives/sub-a_msk.nii"]),
        ("hecktor", ["imagesTr/a__mprage.nii.gz", "imagesTr/a__dark-fluid.nii.gz", "labelsTr/a.nii.gz"]),
        ("myops", ["x/a_T1_mprage.nii.gz", "x/a_Dark-Fluid.nii.gz", "y/a_gd.nii.gz"]),
        ("nnunet", ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"]),
        ("manifest", ["1.nii", "2.nii", "3.nii"]),
    ],
)
def test_files_under_the_names_that_a_config_adds(tmp_path, layout, files):
    for file in files:
        touch((tmp_path / file).parent, Path(file).name)
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "T1_mprage", "1": "Dark-Fluid"}}')
    (tmp_path / "manifest.csv").write_text("case,MPRAGE,dark-fluid,label\na,1.nii,2.nii,3.nii\n")
    (case,) = layouts.find_cases(layout, tmp_path, ("FLAIR", "T1"), NAMES)
    assert case.images == {"T1": tmp_path / files[0], "FLAIR": tmp_path / files[1]} and case.label is not None
    with pytest.raises(UserError, match="x would stand for"):
        layouts.find_cases(layout, tmp_path, ("FLAIR", "T1"), {"T1": ("x",), "FLAIR": ("x",)})


def test_a_name_in_the_config_says_which_of_two_files_is_meant(tmp_path):
    touch(tmp_path / "sub-a", "sub-a_acq-mprage_T1w.nii.gz", "sub-a_acq-tse_T1w.nii.gz")
    with pytest.raises(UserError, match="two files for T1"):
        layouts.find_cases("bids", tmp_path, ("T1",))
    (case,) = layouts.find_cases("bids", tmp_path, ("T1",), {"T1": ("acq-mprage_T1w",)})
    assert case.images["T1"].name == "sub-a_acq-mprage_T1w.nii.gz"


def test_the_names_of_a_config_reach_the_data_set(tmp_path):
    data = importlib.import_module("configs.ms_lesions").get_config().data.copy_and_resolve_references()
    touch(tmp_path, *(f"{kind}.nii.gz" for kind in "abcde"))
    (tmp_path / "manifest.csv").write_text(
        "case,T1W,T1WKS,T2W,FLAIR,label\np,a.nii.gz,b.nii.gz,c.nii.gz,d.nii.gz,e.nii.gz\n"
    )
    data.dir = str(tmp_path)
    (case,) = dataset.find(data)
    assert [path.name[0] for path in case.images.values()] == list("abcd")


def test_a_scan_given_by_another_name(tmp_path):
    touch(tmp_path, "BraTS-GLI-00005-100-t1n.nii.gz", "a_t1_mprage.nii.gz", "MDA-001__PT.nii.gz")
    for given, file, names, expected in (
        ("t1n", "BraTS-GLI-00005-100-t1n.nii.gz", {}, "BraTS-GLI-00005-100"),
        ("MPRAGE", "a_t1_mprage.nii.gz", NAMES, "a"),
    ):
        case = layouts.case_from_files({given: tmp_path / file}, FOUR, names)
        assert case.images == {"T1": tmp_path / file} and case.name == expected
    assert layouts.case_from_files({"pt": tmp_path / "MDA-001__PT.nii.gz"}, ("CT", "PET")).name == "MDA-001"
    with pytest.raises(UserError, match="two files for T1"):
        layouts.case_from_files({"T1": tmp_path / "a_t1_mprage.nii.gz", "t1w": tmp_path / "a_t1_mprage.nii.gz"}, FOUR)
    with pytest.raises(UserError, match="no modality mprage"):
        layouts.case_from_files({"mprage": tmp_path / "a_t1_mprage.nii.gz"}, FOUR)


def test_one_file_is_no_two_modalities(tmp_path):
    touch(tmp_path, "a_t1.nii.gz", "a_flair.nii.gz")
    scan = tmp_path / "a_t1.nii.gz"
    (tmp_path / "link.nii.gz").symlink_to(scan)
    for same in (scan, tmp_path / "link.nii.gz", tmp_path / ".." / tmp_path.name / scan.name):
        with pytest.raises(UserError) as raised:
            layouts.case_from_files({"T1": scan, "FLAIR": tmp_path / "a_flair.nii.gz", "T2": same}, FOUR)
        assert str(raised.value) == f"{same}: is given for T1 and for T2; give each its own file"


def test_a_space_is_no_contrast_agent(tmp_path):
    touch(tmp_path / "sub-a" / "anat", "sub-a_space-MNI_T1w.nii.gz")
    (case,) = layouts.find_cases("bids", tmp_path, ("T1", "T1ce"))
    assert set(case.images) == {"T1"}


def test_every_mistake_is_listed_and_the_first_one_refused(tmp_path):
    for name in "abc":
        touch(tmp_path / name, f"{name}_t1.nii.gz", f"{name}_t1.nii", f"{name}_flair.nii.gz")
    touch(tmp_path / "c", "c_seg.nii", "c_seg.nii.gz")
    listing = layouts.list_cases("brats", tmp_path, ("T1", "FLAIR"))
    assert [set(case.images) for case in listing.cases] == [{"FLAIR"}] * 3
    assert ["two files for T1" in mistake.text for mistake in listing.mistakes] == [True, True, True, False]
    assert "two files for the label: c_seg.nii and c_seg.nii.gz" in listing.mistakes[3].text
    assert {path.name for path in listing.mistakes[3].files} == {"c_seg.nii", "c_seg.nii.gz"}
    with pytest.raises(UserError, match=r"case a has two files for T1.* \(3 more; python -m entrust_jax\.check"):
        layouts.find_cases("brats", tmp_path, ("T1", "FLAIR"))


def test_a_name_that_is_no_text_is_a_mistake(tmp_path):
    name = os.fsdecode(b"\xff")
    touch(tmp_path / name, "a_t1.nii.gz")
    (mistake,) = layouts.list_cases("brats", tmp_path, ("T1",)).mistakes
    assert "no text" in mistake.text and mistake.text.encode()


def test_a_folder_that_may_not_be_read(tmp_path):
    denied = PermissionError(13, "Permission denied", "where")
    with (
        mock.patch.object(Path, "iterdir", side_effect=denied),
        pytest.raises(UserError, match=r"where: cannot be read \(Permission denied\)"),
    ):
        layouts.find_cases("brats", tmp_path, ("T1",))


# --- whatever lies in a folder ------------------------------------------------------------------------------

FOLDERS = {
    "brats": ["a", "b", "BraTS-GLI-1-100", "a/a", ""],
    "nnunet": ["imagesTr", "labelsTr", "imagesTs", ""],
    "bids": ["rawdata/sub-1", "rawdata/sub-1/ses-2", "sub-1", "sub-2/anat", "derivatives/sub-1", "derivatives"],
    "hecktor": ["imagesTr", "labelsTr", "imagesTr/a"],
    "myops": ["train25", "train25_gd", "test20", ""],
    "manifest": ["a", "b", ""],
}
CASES = {layout: ["a", "a", "a", "b", "BraTS-GLI-1-100", "a_b", "-", "_", "é", "İ", "²"] for layout in FOLDERS}
CASES["bids"] = ["sub-1", "sub-1", "sub-1_ses-2", "sub-1_acq-x", "sub-2", "a"]
KINDS = [
    "t1", "T1", "t1n", "T1w", "t1c", "ce-gd_T1w", "FLAIR", "t2f", "seg", "Segm", "msk", "label-lesion_mask", "gd", "PT",
    "CT", "mprage", "T1_MPRAGE", "x-mprage", "0000", "0001", "0002", "²", "٣", "9" * 100, "",
]  # fmt: skip
ENDINGS = [".nii.gz", ".nii", ".NII.GZ", ".nii", ".json", ""]
PLACES = {
    layout: st.tuples(
        st.sampled_from(FOLDERS[layout]),
        st.tuples(
            st.sampled_from(CASES[layout]), st.sampled_from(["_", "_", "-", "__", ""]), st.sampled_from(KINDS),
            st.sampled_from(ENDINGS),
        ).map("".join),
    )
    for layout in FOLDERS
}  # fmt: skip
MODALITIES = ("T1", "T1ce", "FLAIR", "PET")
MORE = {"T1": ("T1_MPRAGE", "x-mprage"), "PET": ("mprage",)}


def cells(path: str) -> st.SearchStrategy[str]:
    return st.sampled_from([path, path, path, "", "gone.nii", "a\0", f"./{path}"])


@contextlib.contextmanager
def another_order():
    """As a file system that lists its files the other way round."""
    iterdir, walk, glob = Path.iterdir, os.walk, Path.glob

    def reversed_walk(*where, **how):
        for root, folders, files in walk(*where, **how):
            folders.reverse()
            files.reverse()
            yield root, folders, files

    with (
        mock.patch.object(Path, "iterdir", lambda self: reversed(list(iterdir(self)))),
        mock.patch.object(Path, "glob", lambda self, pattern: reversed(list(glob(self, pattern)))),
        mock.patch.object(os, "walk", reversed_walk),
    ):
        yield


def listed(layout: str, place: Path, modalities: tuple[str, ...]) -> layouts.Listing | None:
    """The listing, or None where it is refused; anything else is an exception of its own."""
    try:
        return layouts.list_cases(layout, place, modalities, MORE)
    except UserError as error:
        assert "\n" not in str(error) and str(place) in str(error)
        return None


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: thousands of small trees are made and removed in it."""
    shared = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(dir=shared)) if os.access(shared, os.W_OK) else tmp_path
    yield root
    shutil.rmtree(root)


@pytest.mark.parametrize("layout", FOLDERS)
@hypothesis.given(st.data())
@hypothesis.settings(
    max_examples=200, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_whatever_lies_in_a_folder_it_is_cases_or_a_reason(layout, memory, data):
    place = memory / "data"
    files = data.draw(st.lists(PLACES[layout], max_size=9))
    for folder, name in files:
        path = place / folder / name
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):  # a file where a folder is
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    place.mkdir(exist_ok=True)
    rows: list[dict[str, str]] = []
    if layout == "nnunet":
        names = data.draw(st.permutations(["T1", "t1c", "T2f", "mprage", "PT"]))
        (place / "dataset.json").write_text(json.dumps({"channel_names": dict(enumerate(names))}))
    if layout == "manifest":
        head = data.draw(st.sampled_from([("T1", "T1c", "flair", "PET"), ("T1w", "t1ce", "t2f", "mprage", "T1n")]))
        for i, (folder, name) in enumerate(files):
            row = {"case": data.draw(st.sampled_from([str(i), "0", ""])), "label": data.draw(cells(f"{folder}/{name}"))}
            rows.append(row | {column: data.draw(cells(f"{folder}/{name}" if i % 2 else column)) for column in head})
        write_rows(place, rows)
    try:
        found = listed(layout, place, MODALITIES)
        with another_order():
            assert listed(layout, place, MODALITIES) == found
        other = listed(layout, place, MODALITIES[::-1])
        if found is None:
            assert other is None
            return
        assert other is not None and other.cases == found.cases
        assert [case.name for case in found.cases] == sorted({case.name for case in found.cases})
        every = [path for case in found.cases for path in files_of(case)]
        assert all(case.images and set(case.images) <= set(MODALITIES) for case in found.cases)
        assert all(path.is_file() for path in every)
        doubtful = {path for mistake in found.mistakes for path in mistake.files}
        if layout == "manifest":
            for case in found.cases:
                own = [path.resolve() for path in files_of(case)]
                assert len(own) == len(set(own))
            if not found.mistakes:
                write_rows(place, rows[::-1])
                assert listed(layout, place, MODALITIES) == found
        else:
            assert len(every) == len(set(every)) and not doubtful & set(every)
        if any(case.label for case in found.cases):
            with contextlib.suppress(UserError):
                split = types.SimpleNamespace(seed=0, folds=2, fold=0, test_pattern="")
                parts = splits.plan(found.cases, split).parts
                assert {name for own in parts.values() for name in own} == {c.name for c in found.cases if c.label}
    finally:
        shutil.rmtree(place)


def files_of(case: layouts.Case) -> list[Path]:
    return [*case.images.values(), *([case.label] if case.label else [])]


def write_rows(place: Path, rows: list[dict[str, str]]) -> None:
    said = [{"case": row["case"], "label": row["label"]} for row in rows]
    images = [{name: file for name, file in row.items() if name not in ("case", "label")} for row in rows]
    entries = [one | {"images": own} for one, own in zip(said, images, strict=True)]
    (place / "manifest.json").write_text(json.dumps(entries))
