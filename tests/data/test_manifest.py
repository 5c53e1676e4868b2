"""Manifests: what a table of cases says, what is wrong with it, and tables written from a folder."""

import json
import os

import hypothesis
import pytest
from hypothesis import strategies as st

from entrust_jax.data import layouts, manifest
from entrust_jax.errors import UserError


def scans(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.mark.parametrize(
    "text",
    [
        "case,patient,T1,FLAIR,label\nb,p,b/1.nii.gz,b/2.nii.gz,b/s.nii.gz\na,p,a/1.nii.gz,,\n",
        "\ufeffsep=;\r\nCase;PATIENT;t1;flair;Label;;\r\nb; p ;b/1.nii.gz;b/2.nii.gz;b/s.nii.gz;;\r\n"
        "a;p;a/1.nii.gz;;;;\r\n;;;;;;\r\n",
        '[{"case": "b", "patient": "p", "images": {"T1": "b/1.nii.gz", "flair": "b/2.nii.gz"}, "label": "b/s.nii.gz"},'
        ' {"case": "a", "patient": "p", "images": {"T1": "a/1.nii.gz", "FLAIR": null}}]',
    ],
)
def test_tables_of_spreadsheets_and_programs(tmp_path, text):
    scans(tmp_path, "a/1.nii.gz", "b/1.nii.gz", "b/2.nii.gz", "b/s.nii.gz")
    path = tmp_path / ("manifest.json" if text.startswith("[") else "manifest.csv")
    path.write_text(text, encoding="utf-8", newline="")
    for place in (path, tmp_path):
        a, b = layouts.find_cases("manifest", place, ("T1", "FLAIR"))
        assert (a.name, a.patient, set(a.images), a.label) == ("a", "p", {"T1"}, None)
        assert (b.name, b.images["FLAIR"], b.label) == ("b", tmp_path / "b/2.nii.gz", tmp_path / "b/s.nii.gz")


@pytest.mark.parametrize(
    "text",
    [
        "case,T1,label10,label,Label2\n"
        "a,a/1.png,a/r10.png,a/r1.png,a/r2.png\nb,b/1.png,b/r10.png,,b/r2.png\nc,c/1.png,,,\n",
        '[{"case": "a", "images": {"T1": "a/1.png"}, "label": ["a/r1.png", "a/r2.png", "a/r10.png"]},'
        ' {"case": "b", "images": {"T1": "b/1.png"}, "label": [null, "b/r2.png", "b/r10.png"]},'
        ' {"case": "c", "images": {"T1": "c/1.png"}, "label": []}]',
    ],
)
def test_several_raters_of_whom_not_all_looked_at_every_case(tmp_path, text):
    scans(tmp_path, *(f"{case}/{name}.png" for case in "abc" for name in ("1", "r1", "r2", "r10")))
    path = tmp_path / ("manifest.json" if text.startswith("[") else "manifest.csv")
    path.write_text(text)
    a, b, c = layouts.find_cases("manifest", tmp_path, ("T1",))
    assert a.label == tmp_path / "a/r1.png" and a.raters == (tmp_path / "a/r2.png", tmp_path / "a/r10.png")
    assert b.label == tmp_path / "b/r2.png" and b.raters == (tmp_path / "b/r10.png",)
    assert c.label is None and c.raters == () and set(c.images) == {"T1"}


def test_without_a_patient_every_case_is_one(tmp_path):
    scans(tmp_path, "1.nii.gz")
    (tmp_path / "m.csv").write_text("case,T1\na,1.nii.gz\n")
    assert layouts.find_cases("manifest", tmp_path / "m.csv", ("T1",))[0].patient == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,T1\na,1.nii.gz\na,1.nii.gz\n", r"manifest\.csv, line 3: a second case a"),
        ("case,T1\na,gone.nii.gz\n", r"line 2: T1 of case a: .*gone\.nii\.gz: no such file"),
        ("case,T1,label\na,1.nii.gz,gone.nii.gz\n", r"line 2: label of case a: .*gone\.nii\.gz"),
        ("case,T1\na,1.nii.gz,more\n", "line 2: has 3 cells, the first line 2"),
        ("case,T1,label\na,1.nii.gz\n", "line 2: has 2 cells, the first line 3"),
        ("\nsep=,\ncase,T1\na,1.nii.gz\na,1.nii.gz\n", "line 5: a second case a"),
        ("case,T1,label,label_2\na,1.nii.gz,,\n", "column label_2: name those of several raters label, label2"),
        ("case,T1,label,label2\na,1.nii.gz,,gone.png\n", r"line 2: label2 of case a: gone\.png: no such file"),
        ("case,T1,\na,1.nii.gz,more\n", "line 2: more stands in a column without a name"),
        ('case,T1\na,"1.nii.gz\n' + 100 * "b,2.nii.gz\n", r"T1 of case a: 1\.nii\.gz\.\.\.: no such file"),
        ("case,T1\na," + 5000 * "x" + "\n", r"line 2: T1 of case a: x+\.\.\.: no such file"),
        (140_000 * "x" + ",case,T1\n", "line 1: field larger than field limit"),
        ("name,T1\na,1.nii.gz\n", "has no column case"),
        ("case,T1,t1\na,1.nii.gz,1.nii.gz\n", "two columns t1"),
        ("case,PET\na,1.nii.gz\n", "has no modality T1, it has pet"),
        ("case,T1\n,1.nii.gz\n", "line 2: the case has no name"),
        ("", "has no column case"),
        ("case,T1\n", "has no modality T1, it has none"),
        ("case,patient_id,T1\na,p,1.nii.gz\n", "column patient_id is not read; call it patient"),
        ("case,PatientID,T1\na,p,1.nii.gz\n", "column PatientID is not read; call it patient"),
        ("case,patient,Subject,T1\na,,s,1.nii.gz\n", "column Subject is not read; call it patient"),
        ("case,pid,T1\na,p,1.nii.gz\n", "column pid is not read; call it patient"),
        ("case,T1,mask\na,1.nii.gz,1.nii.gz\n", "column mask is not read; call it label"),
        ("case,T1,Lesion_Seg\na,1.nii.gz,\n", "column Lesion_Seg is not read; call it label"),
        ("case,T1,segmentation2\na,1.nii.gz,\n", "column segmentation2 is not read; call it label"),
        ("case,T1,split\na,1.nii.gz,test\n", r"column split is not read; remove it: config\.data\.split"),
        ("case,T1,cv_fold\na,1.nii.gz,0\n", "column cv_fold is not read; remove it"),
        ("case,T1\na,plain\n", r"line 2: T1 of case a: plain: is a folder; give the file of the scan"),
        ("case,T1\na,series\n", "line 2: T1 of case a: series: is a folder of DICOM files; convert .* dcm2niix"),
        ("case,T1\na,series/IM1\n", "line 2: T1 of case a: series/IM1: is a DICOM file; convert .* dcm2niix"),
        ("case,T1\na,1.nrrd\n", r"line 2: T1 of case a: 1\.nrrd: is \.nrrd, a format that is not read; convert it"),
        ("case,T1\na,1.hdr\n", r"T1 of case a: 1\.hdr: is \.hdr, a format that is not read; convert it to NIfTI"),
        ("case,T1\na,notes.txt\n", r"T1 of case a: notes\.txt: is neither NIfTI nor PNG nor JPEG by its name"),
        ("case,T1\na,link.nii.gz\n", r"T1 of case a: link\.nii\.gz: is a link to nothing; get the file \(git annex"),
    ],
)
def test_mistakes_in_a_table_are_named_with_their_line(tmp_path, text, message):
    scans(tmp_path, "1.nii.gz", "1.nrrd", "1.hdr", "notes.txt", "series/IM1", "plain/2.nii.gz")
    (tmp_path / "series" / "IM1").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "annex")
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        layouts.find_cases("manifest", tmp_path, ("T1",))
    assert str(tmp_path / "manifest.csv") in str(error.value)


def test_a_column_that_is_not_read_is_named_and_stops_nothing(tmp_path):
    scans(tmp_path, "1.nii.gz", "2.nii.gz", "3.nii.gz", "4.nii.gz")
    (tmp_path / "manifest.csv").write_text(
        "case,patient,subject_id,T1,MPRAGE,t1w,age,Brain_Mask,label\na,p,s,1.nii.gz,2.nii.gz,3.nii.gz,50,,4.nii.gz\n"
    )
    found = layouts.list_cases("manifest", tmp_path, ("T1",))
    assert found.mistakes == [] and found.cases[0].images["T1"].name == "1.nii.gz"  # beside a patient it is one more
    assert found.notes == (
        f"{tmp_path}/manifest.csv: columns age, Brain_Mask, MPRAGE, subject_id, t1w are no modalities of the config;"
        " not read",
    )
    # What the config names, or knows as a synonym, is read, whatever it looks like.
    (tmp_path / "manifest.csv").write_text("case,t1w,mask,seg\na,1.nii.gz,2.nii.gz,3.nii.gz\n")
    found = layouts.list_cases("manifest", tmp_path, ("T1", "MASK", "PET"), {"PET": ("seg",)})
    assert found.mistakes == [] and found.notes == () and len(found.cases[0].images) == 3
    # In JSON too.
    (tmp_path / "manifest.csv").unlink()
    entries = [{"case": "a", "images": {"T1": "1.nii.gz", "gt": "2.nii.gz", "x": "3.nii.gz"}}]
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    found = layouts.list_cases("manifest", tmp_path, ("T1",))
    assert "column gt is not read; call it label" in found.mistakes[0].text and "column x is no" in found.notes[0]


def test_blanks_after_commas(tmp_path):
    scans(tmp_path, "a, b/1.nii.gz", "2.nii.gz")
    (tmp_path / "manifest.csv").write_text('case, T1, "label"\n"a", "a, b/1.nii.gz", "2.nii.gz"\n')
    (case,) = layouts.find_cases("manifest", tmp_path, ("T1",))
    assert case.images["T1"] == tmp_path / "a, b/1.nii.gz" and case.label == tmp_path / "2.nii.gz"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("{}", "must be a list of cases"),
        ("[1]", "entry 1: is no case"),
        ('[{"case": "a"}]', 'entry 1: is no case with "images"'),
        ('[{"case": "a", "images": {"T1": 3}}]', "entry 1: 3 is no text"),
        ('[{"case": "a", "images": {}, "mask": "x"}]', "entry 1: unknown key 'mask'"),
        ('[{"case": "a", "images": {}, "label": [3]}]', "entry 1: 3 is no text"),
        ("[" * 100_000, "is no JSON"),
        ('[{"case": "a", "images": {"T1": "x", "t1": "y"}}]', "entry 1: two images of one modality"),
    ],
)
def test_mistakes_in_a_json_manifest(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message):
        layouts.find_cases("manifest", tmp_path, ("T1",))


def test_each_entry_may_name_its_modalities_as_it_likes(tmp_path):
    scans(tmp_path, "1.nii.gz", "2.nii.gz")
    entries = [{"case": "a", "images": {"T1": "1.nii.gz"}}, {"case": "b", "images": {"t1w": "2.nii.gz"}}]
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    found = layouts.find_cases("manifest", tmp_path, ("T1",))
    assert [case.images["T1"].name for case in found] == ["1.nii.gz", "2.nii.gz"]


def test_a_folder_needs_one_manifest(tmp_path):
    with pytest.raises(UserError, match=r"holds no manifest; .*python -m entrust_jax\.manifest"):
        layouts.find_cases("manifest", tmp_path, ("T1",))
    scans(tmp_path, *manifest.NAMES)
    with pytest.raises(UserError, match="holds two manifests"):
        layouts.find_cases("manifest", tmp_path, ("T1",))
    (tmp_path / "latin.csv").write_bytes(b"case,T1\n\xe9,1.nii.gz\n")
    (tmp_path / "wide.csv").write_text("case,T1\na,1.nii.gz\n", encoding="utf-16")
    for name in ("latin.csv", "wide.csv"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read .*; save it as UTF-8 text") as error:
            layouts.find_cases("manifest", tmp_path / name, ("T1",))
        assert "\n" not in str(error.value)


@hypothesis.given(st.one_of(st.text(), st.text("case,T1\n;\"'\r\t\0ab.")), st.booleans())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None)
def test_no_text_is_too_odd(tmp_path, text, as_json):
    """Any text is read, or refused with one message."""
    path = tmp_path / ("m.json" if as_json else "m.csv")
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        manifest.manifest_cases(path, {"T1": ("t1", "t1w")})
    except UserError as error:
        assert str(path) in str(error)


@hypothesis.given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["case", "images", "label", "patient", "T1"]), x),
    )
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None)
def test_no_json_is_too_odd(tmp_path, value):
    path = tmp_path / "m.json"
    path.write_text(json.dumps(value))
    try:
        manifest.manifest_cases(path, {"T1": ("t1", "t1w")})
    except UserError as error:
        assert str(path) in str(error)


# --- writing one --------------------------------------------------------------------------------------------


def test_a_table_is_written_from_a_folder_and_read_again(tmp_path):
    data = tmp_path / "data"
    scans(data, "p1/s 1/T1.nii.gz", "p1/s 1/seg.nii.gz", "p1/s2/T1.NII.GZ", "p1/s2/PET_image.nii.gz", "p2/s2/T1.nii.gz")
    scans(data, "p1/s2/notes.txt", "p1/s2/T1.nii/empty.txt")
    (tmp_path / "elsewhere").mkdir()
    scans(tmp_path, "elsewhere/s1/T1.nii.gz")
    (data / "p3").symlink_to(tmp_path / "elsewhere")
    templates = {"T1": "./{patient}/{case}/T1.nii.gz", "PET": "{patient}/{case}/PET*", "label": "{patient}/{case}/seg*"}
    rows = manifest.collect(data, templates)
    (tmp_path / "tables").mkdir()
    path = tmp_path / "tables" / "m.csv"
    path.write_text(manifest.as_csv(rows, list(templates), "../data"))
    first, second, third, fourth = layouts.find_cases("manifest", path, ("PET", "T1"))
    assert [case.name for case in (first, second, third, fourth)] == ["p1_s 1", "p1_s2", "p2_s2", "p3_s1"]
    assert first.patient == second.patient == "p1" and (third.patient, fourth.patient) == ("p2", "p3")
    assert first.label is not None and first.label.resolve() == (data / "p1/s 1/seg.nii.gz").resolve()
    assert set(second.images) == {"T1", "PET"} and second.label is None


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"T1": "T1*.nii.gz"}, "does not say where the case's name stands"),
        ({"T1": "{name}/T1.nii.gz"}, r"\{name\} stands for nothing"),
        ({"T1": "{case}/T9.nii.gz"}, "no NIfTI, PNG or JPEG file fits T1="),
        ({"T1": "{case}/*.nii.gz"}, r"a/T1\.nii\.gz and a/T2\.nii\.gz are both T1 of case a"),
        ({"T1": "*/{case}/x.nii.gz"}, r"\* stands for a part of a file's name"),
        ({"T1": "{case}/T1.nii.gz", "CT": "other/{patient}_{case}.nii.gz"}, r"T1=.*: has no \{patient\}, others have"),
        ({"T1": "{case}/T1.nii.gz", "label": "other/q_{case}.nii.gz"}, r"is the label of case b, which has no scan"),
    ],
)
def test_patterns_that_say_too_little_or_too_much(tmp_path, templates, message):
    scans(tmp_path, "a/T1.nii.gz", "a/T2.nii.gz", "p/a/x.nii.gz", "other/q_a.nii.gz", "other/q_b.nii.gz")
    with pytest.raises(UserError, match=message):
        manifest.collect(tmp_path, templates)


def test_scans_that_fit_no_pattern_are_told_those_of_whole_cases_first(tmp_path):
    scans(tmp_path, "c0/T1.nii.gz", "c0/CT.nii.gz", "c1/t1.nii.gz", "c2/T1.nrrd", "c0/view.png", ".git/x.nii.gz")
    rows = manifest.collect(tmp_path, {"T1": "{case}/T1.nii.gz"})
    assert manifest.unfitting(tmp_path, rows) == ["c1/t1.nii.gz", "c2/T1.nrrd", "c0/CT.nii.gz"]
    assert manifest.unfitting(tmp_path, manifest.collect(tmp_path, {"T1": "{case}/view.png"}))[-1] == "c0/T1.nii.gz"


def test_formats_that_are_not_read_and_links_to_nothing_are_told_from_missing_files(tmp_path):
    scans(tmp_path, "a/T1.mha")
    with pytest.raises(UserError, match=r"a/T1\.mha: is \.mha, a format that is not read; convert it to NIfTI"):
        manifest.collect(tmp_path, {"T1": "{case}/T1.nii.gz"})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "T1.nii.gz").symlink_to(tmp_path / "annex")
    rows = manifest.collect(tmp_path, {"T1": "{case}/T1.nii.gz"})
    (tmp_path / "manifest.csv").write_text(manifest.as_csv(rows, ["T1"], "."))
    with pytest.raises(UserError, match=r"line 2: T1 of case b: b/T1\.nii\.gz: is a link to nothing; get the file"):
        layouts.find_cases("manifest", tmp_path, ("T1",))


def test_a_mask_beside_a_series_hides_nothing(tmp_path):
    scans(tmp_path, "a/IM1.dcm", "a/seg.nii.gz")
    with pytest.raises(UserError, match=r"file fits T1=.*; and .*a/IM1\.dcm: is a DICOM file; convert .* dcm2niix"):
        manifest.collect(tmp_path, {"T1": "{case}/T1.nii.gz", "label": "{case}/seg.nii.gz"})


def test_a_path_that_is_no_text_is_named(tmp_path):
    scans(tmp_path, os.fsdecode(b"b\xfc/T1.nii.gz"))
    rows = manifest.collect(tmp_path, {"T1": "{case}/T1.nii.gz"})
    with pytest.raises(UserError, match=r"'b\\udcfc/T1\.nii\.gz': this path is no text") as error:
        manifest.as_csv(rows, ["T1"], ".")
    assert str(error.value).encode()


def test_pictures_of_several_raters_are_collected(tmp_path):
    scans(tmp_path, "7/image_8.JPG", "7/label0_.jpg", "7/label1_.jpg", "9/image_10.jpeg", "9/label1_.jpg", "9/notes")
    templates = {"CT": "{case}/image_*.jpg", "label0": "{case}/label0_.jpg", "label1": "{case}/label1_.jpg"}
    assert [row["case"] for row in manifest.collect(tmp_path, {"CT": "{case}/image_*.jpeg"})] == ["9"]
    with pytest.raises(UserError, match=r"9/label1_\.jpg is the label of case 9, which has no scan"):
        manifest.collect(tmp_path, templates)
    scans(tmp_path, "9/image_10.jpg")
    rows = manifest.collect(tmp_path, templates)
    (tmp_path / "manifest.csv").write_text(manifest.as_csv(rows, list(templates), "."))
    seven, nine = layouts.find_cases("manifest", tmp_path, ("CT",))
    assert seven.label == tmp_path / "7/label0_.jpg" and seven.raters == (tmp_path / "7/label1_.jpg",)
    assert nine.label == tmp_path / "9/label1_.jpg" and nine.raters == ()


def test_a_name_that_comes_twice_must_be_the_same(tmp_path):
    scans(tmp_path, "a/a_T1.nii.gz", "b/x_T1.nii.gz")
    assert [row["case"] for row in manifest.collect(tmp_path, {"T1": "{case}/{case}_T1.nii.gz"})] == ["a"]


def test_links_that_run_in_circles_end(tmp_path):
    scans(tmp_path, "a/T1.nii.gz")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert len(manifest.collect(tmp_path, {"T1": "{case}/T1.nii.gz"})) == 1
