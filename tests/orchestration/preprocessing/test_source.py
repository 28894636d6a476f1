"""What a folder and a labels table say of its files."""

import gzip
import io
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from brainray.errors import DataError
from brainray.mri.slices import RejectedImage
from brainray.orchestration.preprocessing.slice_rows import read_file
from brainray.orchestration.preprocessing.source import (
    FoundFile,
    Listing,
    SourceFile,
    check_frames,
    files_of_tasks,
    list_source,
)
from brainray.storage import Folder


def make(folder: Path, *names: str) -> Folder:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return Folder(folder)


def listed(source: Folder, labels: Folder | None = None, **renames: str) -> list[tuple]:
    listing = list_source(source, labels, renames)
    return [(file.path, file.split, file.label, file.subject) for file in listing.files]


def test_split_folders_with_class_folders(tmp_path: Path) -> None:
    source = make(tmp_path, "Training/a/1.jpg", "Training/b/2.PNG", "Testing/a/3.jpg")
    assert listed(source, a="glioma") == [
        ("Testing/a/3.jpg", "test", "glioma", None),
        ("Training/a/1.jpg", "train", "glioma", None),
        ("Training/b/2.PNG", "train", "b", None),
    ]


def test_an_accent_is_one_letter_however_it_is_typed(tmp_path: Path) -> None:
    composed, decomposed = (normalize(form, "métastase") for form in ("NFC", "NFD"))
    source = make(tmp_path, f"{decomposed}/1.jpg", "mets/2.jpg")
    for typed in (composed, decomposed):
        assert [row[2] for row in listed(source, mets=typed)] == [composed, composed]
        assert [row[2] for row in listed(source, None, **{typed: "mets"})] == ["mets", "mets"]


def test_class_folders_and_bare_files(tmp_path: Path) -> None:
    source = make(tmp_path, "a/1.jpg", "a/deep/2.jpg", "bare.tif", ".hidden/3.jpg", "notes.txt")
    assert listed(source) == [
        ("a/1.jpg", None, "a", None),
        ("a/deep/2.jpg", None, "a", None),
        ("bare.tif", None, None, None),
    ]
    assert list_source(source, None, {}).num_ignored == 1


def test_a_storage_within_the_source_is_left_out(tmp_path: Path) -> None:
    source = make(tmp_path / "data", "a/1.jpg", "out/datasets/x/figures/2.png", "output/3.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "results").symlink_to("out/datasets")
    for storage in (tmp_path / "data" / "out", tmp_path / "link" / "out"):
        found = list_source(source, None, {}, storage=Folder(storage)).files
        assert [file.path for file in found] == ["a/1.jpg", "output/3.png"]
    found = list_source(source, None, {}, storage=Folder(tmp_path / "elsewhere")).files
    assert len(found) == 3


def test_what_is_hidden_or_in_the_storage_is_left_out_of_an_object_store_too(
    tmp_path: Path,
) -> None:
    names = ["a/1.jpg", "a/.2.jpg", ".raw/a/3.jpg", "__MACOSX/a/4.jpg", "a/.deep/b/5.jpg"]
    make(tmp_path / "data", *names, "out/datasets/x/figures/6.png", "output/7.png")
    source, storage, elsewhere = (Folder(tmp_path) for _ in range(3))
    for folder, path in ((source, "data"), (storage, "data/out"), (elsewhere, "data2/out")):
        folder.filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
        folder.path = path
    in_storage = "out/datasets/x/figures/6.png"
    for left_out, also_found in ((storage, []), (elsewhere, [in_storage]), (None, [in_storage])):
        found = list_source(source, None, {}, storage=left_out).files
        assert [file.path for file in found] == ["a/1.jpg", *also_found, "output/7.png"]


def test_a_folder_of_unlabelled_slices_is_no_class(tmp_path: Path) -> None:
    source = make(tmp_path, "Training/a/1.jpg", "Training/Unlabelled/2.jpg", "Testing/a/3.jpg")
    assert listed(source)[1] == ("Training/Unlabelled/2.jpg", "train", None, None)
    assert listed(source, a="unlabeled")[2] == ("Training/a/1.jpg", "train", None, None)


def test_dicom_files_may_be_named_by_a_uid(tmp_path: Path) -> None:
    source = make(tmp_path, "a/MR.1.2.840.113619", "a/1.2.840.10008.7", "a/notes.1")
    for name in ("MR.1.2.840.113619", "1.2.840.10008.7"):
        (tmp_path / "a" / name).write_bytes(bytes(128) + b"DICM")
    assert [path for path, *_ in listed(source)] == ["a/1.2.840.10008.7", "a/MR.1.2.840.113619"]


def test_a_labels_table_names_classes_splits_and_subjects(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "x/1.jpg", "x/2.jpg", "3.jpg")
    table = tmp_path / "labels.csv"
    table.write_text("path,label,split,subject\nx/1.jpg,0,train,007\nx/2.jpg,,test,\n")
    expected = [
        ("3.jpg", "train", None, None),
        ("x/1.jpg", "train", "0", "007"),
        ("x/2.jpg", "test", None, None),
    ]
    assert listed(source, Folder(table)) == expected
    columns = {"path": ["x/1.jpg"], "label": ["0"], "split": ["train"], "subject": ["007"]}
    for parquet in (tmp_path / "labels.parquet", tmp_path / "LABELS.PQ"):
        pq.write_table(pa.table(columns), parquet)
        assert listed(source, Folder(parquet))[1] == expected[1]


def test_a_table_as_spreadsheets_and_r_write_it(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "1.jpg", "2.jpg", "3.jpg")
    table = tmp_path / "labels.csv"
    lines = ["\ufeffpath, label ,subject", "1.jpg, glioma ,007", "2.jpg,NA,NA", "3.jpg ,glioma,8"]
    table.write_text("\r\n".join(lines), encoding="utf-8")
    assert listed(source, Folder(table)) == [
        ("1.jpg", None, "glioma", "007"),
        ("2.jpg", None, None, None),
        ("3.jpg", None, "glioma", "8"),
    ]


def test_the_row_of_a_folder_tells_what_the_rows_of_its_files_leave_open(tmp_path: Path) -> None:
    source = make(
        tmp_path / "s", "p7/a/1.jpg", "p7/a/2.jpg", "p7/3.jpg", "p8/4.jpg", "p7b/5.jpg", "6.jpg"
    )
    table = tmp_path / "labels.csv"
    table.write_text(
        "path,label,split,subject\n"
        "p7/,,train,seven\n"
        "p7/a,glioma,,\n"
        "p7/a/2.jpg,notumor,,\n"
        "p8\\,glioma,test,eight\n"
        "p7b/5.jpg,,test,\n"
    )
    assert listed(source, Folder(table)) == [
        ("6.jpg", "train", None, None),
        ("p7/3.jpg", "train", None, "seven"),
        ("p7/a/1.jpg", "train", "glioma", "seven"),
        ("p7/a/2.jpg", "train", "notumor", "seven"),
        ("p7b/5.jpg", "test", None, None),
        ("p8/4.jpg", "test", "glioma", "eight"),
    ]
    table.write_text("path,label\np7,glioma\np7/,notumor\n")
    with pytest.raises(DataError, match="rows of 'p7' have different values in column 'label'"):
        listed(source, Folder(table))


def test_rows_of_one_path_complete_each_other(tmp_path: Path) -> None:
    """As when the slices to label next, of which a volume may have several, are appended."""
    source = make(tmp_path / "s", "1.nii.gz", "2.jpg")
    table = tmp_path / "labels.csv"
    table.write_text(
        "path,label,subject\n1.nii.gz,,p1\n2.jpg,,p2\n1.nii.gz,glioma,\n1.nii.gz,glioma,\n"
    )
    assert listed(source, Folder(table)) == [
        ("1.nii.gz", None, "glioma", "p1"),
        ("2.jpg", None, None, "p2"),
    ]


def test_single_slices_of_a_file_have_labels_of_their_own(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "v/1.nii.gz", "2.jpg")
    table = tmp_path / "labels.csv"
    rows = ["v/1.nii.gz,,notumor,", "v/1.nii.gz,a=1,glioma,p1", "v/1.nii.gz,a=2,,", "2.jpg,,pit,p2"]
    table.write_text("\n".join(["path,frame,label,subject", *rows]))
    renames = {"pit": "pituitary", "glioma": "tumour"}
    still, volume = list_source(source, Folder(table), renames).files
    assert (still.label_of(""), still.subject) == ("pituitary", "p2")
    assert [volume.label_of(f"a={n}") for n in range(3)] == ["notumor", "tumour", "notumor"]
    assert volume.labels == {"notumor", "tumour"}
    assert volume.subject == "p1"
    ignored = list_source(source, Folder(table), {"glioma": None})
    assert ignored.files[1].label_of("a=1") is None
    assert ignored.files[1].label_of("a=2") == "notumor"
    before = ignored.fingerprint(b"")
    table.write_text(table.read_text().replace("a=1", "a=2"))
    assert list_source(source, Folder(table), {"glioma": None}).fingerprint(b"") != before


def test_labels_of_slices_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "v/1.nii.gz")
    table = tmp_path / "labels.csv"
    table.write_text("path,frame,label\nv/1.nii.gz,a=1,x\nv/1.nii.gz,a=1,y\n")
    with pytest.raises(DataError, match="different values in column 'label'"):
        list_source(source, Folder(table), {})
    table.write_text("path,frame,label\nv,a=1,x\n")
    with pytest.raises(DataError, match="frame of 'v', which is a folder"):
        list_source(source, Folder(table), {})


def test_named_frames_are_compared_with_those_of_the_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def check(there: list[str | None], **label_of_frame: str) -> None:
        file = SourceFile(file=FoundFile("1.nii", 1, 1), label_of_frame=label_of_frame)
        rows = [{"path": "1.nii", "frame": f or "", "sample_id": f} for f in there]
        check_frames([file], pa.Table.from_pylist(rows))

    check(["a", "b"], a="glioma")
    check([None], a="glioma")  # a file that cannot be read has no frames
    assert "".join(capsys.readouterr()) == ""
    check(["a", "b"], a="glioma", c="glioma", d="notumor")
    assert "2, such as frame 'c' of '1.nii'" in "".join(capsys.readouterr())
    with pytest.raises(DataError, match="such as 'a'"):
        check(["a", "b"], c="glioma")
    capsys.readouterr()
    check(["volume=0", "volume=1/axial=3"], **{"volume=0/axial=3": "glioma"})  # of a bad volume
    assert "".join(capsys.readouterr()) == ""


def test_ignored_files_are_reported_by_type(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "1.jpg", "2.webp", "b/3.WEBP", "Thumbs.db", "README")
    remarks = list_source(source, None, {}).remarks
    assert remarks == "; ignored files of other types: 4 (.webp 2, .db 1, no suffix 1)"
    (tmp_path / "labels.csv").write_text("path,label\n2.webp,a\n")
    with pytest.raises(DataError, match=r"supported types are \.jpg"):
        listed(source, Folder(tmp_path / "labels.csv"))
    with pytest.raises(DataError, match=r"1\.jpg is a file: give the folder"):
        listed(source / "1.jpg")


def test_blanks_make_no_class_and_null_takes_a_class_away(tmp_path: Path) -> None:
    source = make(tmp_path, "a/1.jpg", "a /2.jpg", "b/3.jpg")
    assert [label for _, _, label, _ in listed(source)] == ["a", "a", "b"]
    taken = list_source(source, None, {"b": None}).files
    assert [file.label for file in taken] == ["a", "a", None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\nabsent.jpg,a\n", "'absent.jpg' is neither an image file"),
        (
            "path,label\n1.jpg,a\n1.jpg,b\n",
            "rows of '1.jpg' have different values in column 'label'",
        ),
        ("file,label\n1.jpg,a\n", r"missing column path \(columns found: 2\)"),
        ("path label\n1.jpg a\n", r"missing column label and path .*found: 1\).* by commas"),
        (
            "path,label\n1.jpg,a\n2.jpg,A\n",
            r"'A' and 'a' differ only in case, .* classes\.map\.A=a",
        ),
        (
            "path,label\n1.jpg,no_tumor\n2.jpg,No -tumor\n",
            r"'No -tumor' and 'no_tumor' differ only in case, blanks, _ or -: merge",
        ),
        ("path,label\n1.jpg,a\n2.jpg,#NV\n", "#NV in column label is a spreadsheet error"),
        ("path,label\n1.jpg,a\n#DIV/0!,a\n", "#DIV/0! in column path is a spreadsheet error"),
        ("path,label,Patient ID\n1.jpg,a,7\n", "'patient id' is not read: rename it to 'subject'"),
        ("path;label;CaseID\n1.jpg;a;7\n", "'caseid' is not read: rename it to 'subject'"),
        ("path,label,set\n1.jpg,a,test\n", "'set' is not read: rename it to 'split'"),
        ("Export of May\n\npath,label\n1.jpg,a\n", "the header is line 3: delete the lines above"),
        ("# made by hand,,\npath,label,x\n1.jpg,a,\n", "the header is line 2"),
        ("path,label,split\n1.jpg,a,holdout\n", "split 'holdout' of '1.jpg'"),
        ("path,label,subject\n1.jpg,a,p\n2.jpg,b\n", "as many cells as the header"),
        ("path,label\n1.jpg,a,b\n", "quote cells with commas"),
    ],
)
def test_a_table_that_does_not_fit_is_explained(tmp_path: Path, content: str, message: str) -> None:
    source = make(tmp_path / "s", "1.jpg", "2.jpg")
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        list_source(source, Folder(tmp_path / "labels.csv"), {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"PK\x03\x04" + bytes(600),
            "is a spreadsheet file or an archive: save it as CSV in UTF-8",
        ),
        (b"\xd0\xcf\x11\xe0\xa1\xb1" + bytes(600), "is a spreadsheet file"),
        (
            "path,label\n1.jpg,a\n".encode("utf-16-le"),
            "NUL bytes, as text in UTF-16 does: save it as",
        ),
        (gzip.compress(b"path,label\n1.jpg,a\n")[:-9], "cannot be read as CSV"),
    ],
)
def test_a_file_of_another_kind_is_no_table(tmp_path: Path, content: bytes, message: str) -> None:
    source = make(tmp_path / "s", "1.jpg")
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list_source(source, Folder(tmp_path / "labels.csv"), {})


def parquet(**columns: list[object]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(b"path,label\n1.jpg,a\n"),
        parquet(path=["1.jpg"], label=["a"]),
        b"sep=;\r\npath;label\r\n1.jpg;a\r\n",
        b'\xef\xbb\xbf"sep=\t"\npath\tlabel\n1.jpg\ta\n',
    ],
)
def test_a_table_is_read_whatever_its_name_and_packing(tmp_path: Path, content: bytes) -> None:
    source = make(tmp_path / "s", "1.jpg")
    (tmp_path / "labels.csv").write_bytes(content)
    assert listed(source, Folder(tmp_path / "labels.csv")) == [("1.jpg", None, "a", None)]


def test_columns_that_are_not_read_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "s", "1.jpg")
    table = tmp_path / "labels.csv"

    def notes(content: str, *, reads_splits: bool = True) -> str:
        table.write_text(content)
        list_source(source, Folder(table), {}, reads_splits=reads_splits)
        return capsys.readouterr().out

    told = notes("age,path,label,patient_id,subject\n50,1.jpg,a,7,7\n")
    assert "columns read: path, label, subject; not read: age, patient_id\n" in told
    assert notes("path,label,split,,\n1.jpg,a,test,,\n") == ""
    told = notes("path,label,set\n1.jpg,a,test\n", reads_splits=False)
    assert "columns read: path, label; not read: set\n" in told
    told = notes("path,label,split\n1.jpg,a,test\n", reads_splits=False)
    assert "columns read: path, label; not read: split\n" in told


@pytest.mark.parametrize("cell", ["-", "--", "?", ".", "\u2014", "n.a.", "N.A.", "<NA>", "null"])
def test_a_placeholder_is_no_label(tmp_path: Path, cell: str) -> None:
    source = make(tmp_path / "s", "1.jpg", "2.jpg")
    (tmp_path / "labels.csv").write_text(f"path,label,split\n1.jpg,{cell},{cell}\n2.jpg,-1,\n")
    rows = listed(source, Folder(tmp_path / "labels.csv"))
    assert rows == [("1.jpg", None, None, None), ("2.jpg", None, "-1", None)]


@pytest.mark.parametrize("cell", ["+", "++", "\u2713"])
def test_a_finding_is_not_taken_for_a_placeholder(tmp_path: Path, cell: str) -> None:
    source = make(tmp_path / "s", "1.jpg", "2.jpg")
    (tmp_path / "labels.csv").write_text(f"path,label\n1.jpg,{cell}\n2.jpg,-\n")
    with pytest.raises(
        DataError, match=r"is not a valid class name .* rename it in the labels table"
    ):
        listed(source, Folder(tmp_path / "labels.csv"))


def test_what_spreadsheets_leave_in_a_table_does_no_harm(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "1.jpg")
    (tmp_path / "labels.csv").write_bytes(b"\xef\xbb\xbfpath,label\r\n1.jpg,a\r\n,\r\n , \r\n")
    (file,) = list_source(source, Folder(tmp_path / "labels.csv"), {}).files
    assert file.label == "a"
    (tmp_path / "labels.csv").write_bytes("path,label\n1.jpg,tumör\n".encode("cp1252"))
    with pytest.raises(DataError, match="save it as CSV in UTF-8"):
        list_source(source, Folder(tmp_path / "labels.csv"), {})


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "1.jpg")
    (tmp_path / "labels").mkdir()
    with pytest.raises(DataError, match="labels is a folder, not a file"):
        list_source(source, Folder(tmp_path / "labels"), {})


@pytest.mark.parametrize("before", ["", "\n", "\r\n\r\n"])
def test_a_table_may_come_from_a_spreadsheet(tmp_path: Path, before: str) -> None:
    source = make(tmp_path / "s", "a,b.jpg")
    table = f"{before}Path;Label ;SUBJECT\na,b.jpg;glioma;Doe, Jane\n"
    (tmp_path / "labels.csv").write_text(table)
    rows = listed(source, Folder(tmp_path / "labels.csv"))
    assert rows == [("a,b.jpg", None, "glioma", "Doe, Jane")]


def test_a_header_may_contain_another_separator_than_its_own(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "1.jpg", "2.jpg")
    (tmp_path / "labels.csv").write_text('"path";"label";notes, free\n1.jpg;a;x, y\n2.jpg;b;"z"\n')
    rows = listed(source, Folder(tmp_path / "labels.csv"))
    assert [(path, label) for path, _, label, _ in rows] == [("1.jpg", "a"), ("2.jpg", "b")]


def test_a_large_table_may_have_line_breaks_in_its_cells(tmp_path: Path) -> None:
    """More than Arrow parses at a time."""
    source = make(tmp_path / "s", *(f"{number}.jpg" for number in range(3)))
    comment = "of which each line counts\n" * 20_000  # half of what is parsed at a time
    rows = [f'{number}.jpg,a,"{comment}"\n' for number in range(3)]
    (tmp_path / "labels.csv").write_text("path,label,comment\n" + "".join(rows))
    found = listed(source, Folder(tmp_path / "labels.csv"))
    assert [(path, label) for path, _, label, _ in found] == [
        (f"{number}.jpg", "a") for number in range(3)
    ]


@pytest.mark.parametrize(
    "table",
    [
        'path,label,comment\n1.jpg,a,"seen on 3T\n2.jpg,b,\n3.jpg,a,\n',
        'path,comment,label\n1.jpg,"seen on 3T,a\n2.jpg,,b\n3.jpg,5",a\n',
        'path;label;subject\r\n1.jpg;a;"P1\r\n2.jpg;b;P2\r\n3.jpg;a;P3\r\n',
    ],
)
def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path: Path, table: str) -> None:
    source = make(tmp_path / "s", "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "labels.csv").write_bytes(table.encode())
    with pytest.raises(DataError, match="a cell contains whole rows: close its quote"):
        list_source(source, Folder(tmp_path / "labels.csv"), {})


def test_a_comment_of_several_lines_may_have_as_many_commas_as_a_row(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "1.jpg", "2.jpg")
    comment = "seen twice\nleft, 2 cm, enhancing"
    (tmp_path / "labels.csv").write_text(f'path,label,comment\n1.jpg,a,"{comment}"\n2.jpg,b,\n')
    rows = listed(source, Folder(tmp_path / "labels.csv"))
    assert [(path, label) for path, _, label, _ in rows] == [("1.jpg", "a"), ("2.jpg", "b")]


def test_a_date_that_no_clock_has_is_none(tmp_path: Path) -> None:
    """A share may give 1601 for unknown times; 2300 is as far from what nanoseconds can count."""
    source = make(tmp_path, "a/1.jpg", "a/2.jpg")
    os.utime(tmp_path / "a" / "1.jpg", (10_413_792_000, 10_413_792_000))
    found = [file.file for file in list_source(source, None, {}).files]
    assert found[0].mtime_ns == 0 < found[1].mtime_ns
    assert [read_file(source, file) for file in found] == [b"x", b"x"]


def test_a_pipe_is_no_slice_and_is_not_waited_for(tmp_path: Path) -> None:
    source = make(tmp_path, "a/1.jpg")
    for name in ("pipe", "pipe.png"):
        os.mkfifo(tmp_path / "a" / name)
    found = [file.file for file in list_source(source, None, {}).files]
    assert [(file.path, file.problem) for file in found] == [
        ("a/1.jpg", None),
        ("a/pipe.png", "not a regular file"),
    ]


def test_a_table_may_be_a_spreadsheets_unicode_text(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "1.jpg")
    (tmp_path / "labels.txt").write_bytes("path\tlabel\r\n1.jpg\ttumör\r\n".encode("utf-16"))
    assert listed(source, Folder(tmp_path / "labels.txt")) == [("1.jpg", None, "tumör", None)]


def test_a_table_may_have_text_as_bytes(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "1.jpg")
    large = pa.array([b"glioma"], pa.large_binary())
    columns = {"path": [b"1.jpg"], "label": large, "subject": [7], "image": [b"\xff\xd8\xff"]}
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    rows = listed(source, Folder(tmp_path / "labels.parquet"))
    assert rows == [("1.jpg", None, "glioma", "7")]


def test_a_backslash_is_a_separator_only_if_no_file_has_it_in_its_name(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "a/b.jpg", "a\\b.jpg", "c/d.jpg")
    (tmp_path / "labels.csv").write_text("path,label\na\\b.jpg,glioma\nc\\d.jpg,notumor\n")
    labels = {row[0]: row[2] for row in listed(source, Folder(tmp_path / "labels.csv"))}
    assert labels == {"a/b.jpg": None, "a\\b.jpg": "glioma", "c/d.jpg": "notumor"}


def test_a_path_may_be_quoted_so_that_a_spreadsheet_does_not_evaluate_it(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "=1+1.jpg", "2.jpg")
    (tmp_path / "labels.csv").write_text("path,label\n'=1+1.jpg,glioma\n2.jpg,notumor\n")
    rows = listed(source, Folder(tmp_path / "labels.csv"))
    assert [(path, label) for path, _, label, _ in rows] == [
        ("2.jpg", "notumor"),
        ("=1+1.jpg", "glioma"),
    ]


def test_all_rows_without_a_file_are_counted(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "1.jpg")
    (tmp_path / "labels.csv").write_text("path,label\n1.jpg,a\n2.jpg,a\n3.jpg,a\n")
    with pytest.raises(DataError, match=r"'2.jpg' is .* \(nor are the paths of 1 more rows\)"):
        list_source(source, Folder(tmp_path / "labels.csv"), {})


@pytest.mark.parametrize(
    "written", ["T1/SCAN.JPG", "/data/T1/scan.jpg", "T1/scan.png", "scan", "D:\\T1\\SCAN.JPG"]
)
def test_a_path_that_nearly_fits_is_suggested(tmp_path: Path, written: str) -> None:
    source = make(tmp_path / "s", "T1/scan.jpg", "T1/other.jpg")
    (tmp_path / "labels.csv").write_text(f"path,label\n{written},a\n")
    with pytest.raises(DataError, match=r"did you mean 'T1/scan\.jpg'\?"):
        list_source(source, Folder(tmp_path / "labels.csv"), {})
    (tmp_path / "labels.csv").write_text("path,label\nT2/third.jpg,a\n")
    with pytest.raises(DataError, match="with one; paths must be"):
        list_source(source, Folder(tmp_path / "labels.csv"), {})


def test_a_row_that_does_not_fit_is_not_quoted(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "1.jpg")
    (tmp_path / "labels.csv").write_text("path,label,subject\n1.jpg,a,Doe, Jane\n")
    with pytest.raises(DataError, match=r"Expected 3 columns, got 4 \(quote") as refused:
        list_source(source, Folder(tmp_path / "labels.csv"), {})
    assert "Doe" not in str(refused.value)
    assert "Jane" not in str(refused.value)


def test_renaming_a_class_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    source = make(tmp_path, "a/1.jpg", "b/2.jpg", "notes.txt")
    remarks = list_source(source, None, {"a": "glioma", "gliom": "glioma", "B": None}).remarks
    assert remarks == (
        "; ignored files of other types: 1 (.txt 1)"
        "; no slice has these classes of classes.map: B, gliom"
    )
    assert list_source(make(tmp_path / "a"), None, {}).remarks == ""


def test_an_absent_an_empty_and_a_mixed_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        list_source(Folder(tmp_path / "absent"), None, {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no image file"):
        list_source(Folder(tmp_path / "empty"), None, {})
    mixed = make(tmp_path / "mixed", "Training/a/1.jpg", "other/2.jpg")
    with pytest.raises(DataError, match="Training next to other"):
        list_source(mixed, None, {})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["set/Training/a/1.jpg", "set/Testing/a/2.jpg"], "folder Testing within set"),
        (["a/train/1.jpg", "a/test/2.jpg", "b/train/3.jpg"], "folder test within a"),
        # As an archive that is much used unpacks.
        (["yes/1.jpg", "no/2.jpg", "brain_tumor_dataset/yes/1.jpg"], "folder yes both at the top"),
    ],
)
def test_folders_one_level_too_low_are_not_taken_for_classes(
    tmp_path: Path, names: list[str], message: str
) -> None:
    source = make(tmp_path / "source", *names)
    with pytest.raises(DataError, match=message):
        list_source(source, None, {})
    (tmp_path / "labels.csv").write_text(f"path,label\n{names[0]},a\n")
    assert len(listed(source, Folder(tmp_path / "labels.csv"))) == len(names)


@pytest.mark.parametrize(
    ("folders", "note"),
    [
        (["set/yes", "set/no"], "no, yes within set are not read as classes"),
        (
            ["Train set/a", "Train set/b", "Test set/a", "Test set/b"],
            "a, b within Test set and Train set are not read as classes",
        ),
        (["Training/set/yes", "Training/set/no"], "no, yes within set are not read as classes"),
        # As archives unpack: a folder within a folder of its name.
        (["set/set/yes", "set/set/no"], "no, yes within set/set are not read as classes: if they"),
        (["set/set/yes", "set/set/no"], "are the classes, give source=.../set/set\n"),
        (
            ["Raw Data/Raw/a", "Raw Data/Raw/b", "More Data/More/a", "More Data/More/b"],
            "a, b within More Data/More and Raw Data/Raw are not read as classes",
        ),
        (["Site A/a", "Site A/b", "Site B/a", "Site C/b"], "a, b within Site A and Site B and"),
        (["yes/patient 1", "yes/patient 2", "no/patient 3"], ""),
        (["yes/slices/patient 1", "yes/slices/patient 2", "no/slices/patient 3"], ""),
        (["yes/x", "no/x"], ""),
        (["yes", "no"], ""),
    ],
)
def test_folders_that_look_like_classes_within_classes_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folders: list[str], note: str
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.png").touch()
    list_source(Folder(tmp_path), None, {})
    said = capsys.readouterr().out
    assert (note in said) if note else "as classes" not in said


def test_what_archives_and_file_servers_add_is_no_folder_of_slices(tmp_path: Path) -> None:
    source = make(
        *(tmp_path, "Training/a/1.jpg", "__MACOSX/Training/a/._1.jpg", "__MACOSX/2.jpg"),
        *("Training/a/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/a/3.jpg", "#Snapshot/4.jpg"),
        *("$Recycle.Bin/S-1/5.jpg", "System Volume Information/6.jpg", "lost+found/7.jpg"),
    )
    assert [row[0] for row in listed(source)] == ["Training/a/1.jpg"]


def test_words_for_nobody_name_no_subject_and_numbers_have_no_fraction(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(6)]
    source = make(tmp_path / "s", *names)
    subjects = ["Anon Patient", "unknown", "-", "XXXX", "0", "P0X"]
    rows = [f"{name},1,{subject}" for name, subject in zip(names, subjects, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,subject", *rows]))
    found = [row[3] for row in listed(source, Folder(tmp_path / "labels.csv"))]
    assert found == [None, None, None, None, "0", "P0X"]
    table = pa.table({"path": names[:3], "label": [0.0, -1.0, None], "subject": [7.0, None, 8.5]})
    pq.write_table(table, tmp_path / "labels.parquet")
    assert [row[2:] for row in listed(source, Folder(tmp_path / "labels.parquet"))[:3]] == [
        ("0", "7"),
        ("-1", None),
        (None, "8.5"),
    ]


def test_a_link_back_into_the_tree_ends(tmp_path: Path) -> None:
    source = make(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert [row[0] for row in listed(source)] == ["a/1.jpg"]


def test_a_link_to_a_folder_of_the_source_neither_renames_nor_moves_it(tmp_path: Path) -> None:
    source = make(tmp_path, "Testing/b/1.jpg", "Training/a/2.jpg")
    (tmp_path / "Testing" / "a").symlink_to("../Training/a")
    (tmp_path / "Training" / "favourites").symlink_to("a")
    assert listed(source) == [
        ("Testing/b/1.jpg", "test", "b", None),
        ("Training/a/2.jpg", "train", "a", None),
    ]


def test_links_out_of_the_source_are_listed_and_not_followed(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "a/1.jpg", "b/2.jpg")
    make(tmp_path / "private", "key.jpg", "deep/3.jpg")
    (tmp_path / "source" / "a" / "out.jpg").symlink_to(tmp_path / "private" / "key.jpg")
    (tmp_path / "source" / "a" / "up.jpg").symlink_to("../../private/key.jpg")
    (tmp_path / "source" / "b" / "within.jpg").symlink_to("../a/1.jpg")
    listing = list_source(source, None, {})
    problems = {file.path: file.file.problem for file in listing.files}
    out = "link out of the source folder"
    assert problems == {
        "a/1.jpg": None,
        "a/out.jpg": out,
        "a/up.jpg": out,
        "b/2.jpg": None,
        "b/within.jpg": None,
    }
    for file in listing.files:
        if file.file.problem is not None:
            with pytest.raises(RejectedImage, match=f"{out}: copy the file into the source"):
                read_file(source, file.file)


def test_folders_that_would_be_missing_are_refused(tmp_path: Path) -> None:
    """A whole class may be in them."""
    source = make(tmp_path / "source", "Training/a/1.jpg", ".raw/2.jpg")
    make(tmp_path / "elsewhere", "2.jpg")
    link = tmp_path / "source" / "Training" / "b"
    for target in (tmp_path / "elsewhere", Path("../.raw")):
        link.symlink_to(target)
        with pytest.raises(DataError, match=r"folder Training/b is a link out of the source or .*"):
            list_source(source, None, {})
        link.unlink()
    os.mkdir(os.fsencode(tmp_path / "source") + b"/Tum\xf6r")
    with pytest.raises(
        DataError, match=r"folder Tum\\xf6r is not UTF-8: rename it, such as with conv"
    ):
        list_source(source, None, {})


def test_storage_within_the_source_may_be_a_link_out_of_it(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "a/1.jpg")
    make(tmp_path / "disk", "2.jpg")
    (tmp_path / "source" / "out").symlink_to(tmp_path / "disk")
    storage = Folder(tmp_path / "source" / "out")
    listing = list_source(source, None, {}, storage=storage)
    assert [file.path for file in listing.files] == ["a/1.jpg"]


def test_a_source_may_be_a_link_itself(tmp_path: Path) -> None:
    make(tmp_path / "real", "a/1.jpg")
    (tmp_path / "link").symlink_to("real")
    assert [row[0] for row in listed(Folder(tmp_path / "link"))] == ["a/1.jpg"]


@pytest.mark.parametrize("path", ["../private/key.jpg", "/etc/passwd", "a/../../private/key.jpg"])
def test_a_table_cannot_name_files_out_of_the_source(tmp_path: Path, path: str) -> None:
    source = make(tmp_path / "source", "a/1.jpg")
    make(tmp_path / "private", "key.jpg")
    (tmp_path / "labels.csv").write_text(f"path,label\n{path},a\n")
    with pytest.raises(DataError, match="neither an image file below the source"):
        list_source(source, Folder(tmp_path / "labels.csv"), {})


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", "a\\b", "tab\there", "x" * 101])
def test_a_class_name_that_is_a_path_or_a_text_is_refused(tmp_path: Path, name: str) -> None:
    source = make(tmp_path / "source", "1.jpg")
    pq.write_table(pa.table({"path": ["1.jpg"], "label": [name]}), tmp_path / "labels.parquet")
    labels = Folder(tmp_path / "labels.parquet")
    with pytest.raises(DataError, match="is not a valid class name"):
        list_source(source, labels, {})
    assert listed(source, labels, **{name: "glioma"})[0][2] == "glioma"


def test_the_fingerprint_follows_paths_and_labels(tmp_path: Path) -> None:
    source = make(tmp_path, "a/1.jpg")
    before = list_source(source, None, {}).fingerprint(b"salt")
    assert list_source(source, None, {}).fingerprint(b"salt") == before
    assert list_source(source, None, {"a": "b"}).fingerprint(b"salt") != before
    make(tmp_path, "a/2.jpg")
    assert list_source(source, None, {}).fingerprint(b"salt") != before


@pytest.mark.parametrize(
    ("num_files", "files_per_task", "num_cpus", "sizes"),
    [
        (10, 4, 2, [4, 4, 2]),
        (0, 4, 2, []),
        (100, 0, 1, [50, 25, 16, 9]),  # half a CPU's share of what is left
        (100, 0, 4, [16] * 6 + [4]),  # no task is shorter, however few there are
        (300, 0, 2, [75, 57, 42, 32, 24, 18, 16, 16, 16, 4]),
    ],
)
def test_tasks_are_long_but_enough_for_every_cpu(
    num_files: int, files_per_task: int, num_cpus: int, sizes: list[int]
) -> None:
    files = [FoundFile(f"{number}.jpg", 2_000, 0) for number in range(num_files)]
    tasks = list(files_of_tasks(files, files_per_task, num_cpus))
    assert [len(task) for task in tasks] == sizes
    assert [file for task in tasks for file in task] == files


def test_the_first_of_many_tasks_are_long_and_the_last_short() -> None:
    files = [FoundFile(f"{number}.jpg", 2_000, 0) for number in range(20_000)]
    sizes = [len(task) for task in files_of_tasks(files, 0, 2)]
    assert sizes[:16] == [1024] * 16  # and none is longer
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-3] == 16


def test_large_files_share_no_task_with_many() -> None:
    megabytes = [1, 1, 40, 30, 100, 1]
    files = [FoundFile(f"{i}.nii", size * 2**20, 0) for i, size in enumerate(megabytes)]
    tasks = [[file.num_bytes // 2**20 for file in task] for task in files_of_tasks(files, 9, 1)]
    assert tasks == [[1, 1, 40], [30], [100], [1]]


def test_a_split_of_our_own_reads_none_of_the_tables(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "1.jpg", "2.jpg")
    (tmp_path / "labels.csv").write_text("path,label,split\n1.jpg,a,val\n2.jpg,b,test\n")
    listing = list_source(source, Folder(tmp_path / "labels.csv"), {}, reads_splits=False)
    assert [(file.split, file.label) for file in listing.files] == [(None, "a"), (None, "b")]


def test_accents_are_the_same_however_they_are_written(tmp_path: Path) -> None:
    composed, apart = "T\u00fcmor", "Tu\u0308mor"
    source = make(tmp_path / "s", f"{composed}/1.jpg", f"{apart}/2.jpg")
    assert {row[2] for row in listed(source)} == {composed}
    assert {file.label for file in list_source(source, None, {apart: "glioma"}).files} == {"glioma"}
    rows = f"{apart}/1.jpg,a,Zoe\u0308\n{apart}/2.jpg,b,Zo\u00eb\n"
    (tmp_path / "labels.csv").write_text(f"path,label,subject\n{rows}")
    assert {row[3] for row in listed(source, Folder(tmp_path / "labels.csv"))} == {"Zo\u00eb"}


def test_the_fingerprint_of_a_listing_is_keyed(tmp_path: Path) -> None:
    listing = list_source(make(tmp_path, "a/1.jpg"), None, {})
    assert listing.fingerprint(b"one") != listing.fingerprint(b"another")


@pytest.mark.parametrize("name", ["", " ", " a", "-"])
def test_a_class_needs_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="is not a valid class name"):
        list_source(make(tmp_path, "a/1.jpg"), None, {"a": name})


def test_the_fingerprint_follows_bytes_times_splits_and_subjects() -> None:
    file = SourceFile("train", "a", "anna", file=FoundFile("1.jpg", 5, 7))
    others = [
        replace(file, split="test"),
        replace(file, subject="ben"),
        replace(file, file=FoundFile("1.jpg", 6, 7)),
        replace(file, file=FoundFile("1.jpg", 5, 8)),
    ]
    found = {Listing([one], Counter(), []).fingerprint(b"salt") for one in [file, *others]}
    assert len(found) == 5


def test_of_two_folders_in_a_table_the_nearest_counts(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "p/a/1.jpg", "p/2.jpg")
    (tmp_path / "labels.csv").write_text("path,label\np,glioma\np/a,notumor\n")
    rows = listed(source, Folder(tmp_path / "labels.csv"))
    assert [(path, label) for path, _, label, _ in rows] == [
        ("p/2.jpg", "glioma"),
        ("p/a/1.jpg", "notumor"),
    ]


def test_of_two_paths_that_nearly_fit_none_is_suggested(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "T1/scan.jpg", "T2/scan.jpg")
    (tmp_path / "labels.csv").write_text("path,label\nscan.jpg,a\n")
    with pytest.raises(DataError, match="with one; paths must be"):
        list_source(source, Folder(tmp_path / "labels.csv"), {})


def test_splits_are_read_in_any_case_and_databases_write_null(tmp_path: Path) -> None:
    source = make(tmp_path / "s", "1.jpg", "2.jpg")
    rows = "1.jpg,NULL,Test,null\n2.jpg,a,TRAINING,p1\n"
    (tmp_path / "labels.csv").write_text(f"path,label,split,subject\n{rows}")
    assert listed(source, Folder(tmp_path / "labels.csv")) == [
        ("1.jpg", "test", None, None),
        ("2.jpg", "train", "a", "p1"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label,Label\n1.jpg,a,b\n", "column label appears more than once"),
        ("path,label,subject\n1.jpg,a,p1\n1.jpg,a,p2\n", "values in column 'subject'"),
        ("path,label,split\n1.jpg,a,train\n1.jpg,a,test\n", "values in column 'split'"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    source = make(tmp_path / "s", "1.jpg")
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        list_source(source, Folder(tmp_path / "labels.csv"), {})
