from __future__ import annotations

import random
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuml.datasets import BUILT_IN, Dataset, Preprocessing, load_dataset, split
from gpuml.errors import DataError


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(text: str | bytes, name: str = "table.csv") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def fault(source, *arguments, **options) -> str:
    """The message of the refusal, which must be one line and name the file."""
    with pytest.raises(DataError) as caught:
        load_dataset(source, *arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source).rsplit(".", 1)[0] in message
    return message


def table(n: int = 8, *, header: str = "a,b,y\n") -> str:
    return header + "".join(f"{i},{i * i % 7},{i / 4}\n" for i in range(n))


TABLE = np.array([[i, i * i % 7] for i in range(8)], dtype=float)
TARGET = np.arange(8) / 4


def is_the_table(data: Dataset) -> bool:
    assert data.y is not None
    return np.array_equal(data.X, TABLE) and np.array_equal(data.y, TARGET)


# What scikit-learn brings


@pytest.mark.parametrize(
    ("name", "shape", "task"),
    [
        ("breast_cancer", (569, 30), "classification"),
        ("diabetes", (442, 10), "regression"),
        ("digits", (1797, 64), "classification"),
        ("iris", (150, 4), "classification"),
        ("wine", (178, 13), "classification"),
    ],
)
def test_built_in_data(name, shape, task):
    data = load_dataset(name)
    assert name in BUILT_IN
    assert (data.X.shape, data.task, data.name) == (shape, task, name)
    assert data.X.dtype == np.float64
    assert len(data.feature_names) == shape[1]
    assert data.same_unit == (name == "digits")


def test_a_misspelt_data_set_names_the_nearest():
    assert "did you mean 'digits'?" in fault("digit")


# CSV: what is read


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", ["", "a,b,y\n", '"a","b","y"\n', '" a ",b , y\n'])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_csv_in_all_its_dialects(delimiter, header, newline, start):
    text = start + table(header=header).replace(",", delimiter).replace("\n", newline)
    Path("table.csv").write_bytes(text.encode())
    data = load_dataset("table.csv")
    assert is_the_table(data)
    assert data.feature_names == (("a", "b") if header else ())
    assert data.target_name == ("y" if header else "")


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n", "\r\n\r\n"])
def test_blank_lines_at_the_end_are_no_rows(end):
    assert is_the_table(load_dataset(written(table().rstrip("\n") + end)))


def test_a_quoted_cell_may_hold_the_delimiter_a_quote_and_a_line_break():
    rows = "".join(f'{i},"{i * i % 7}","yes, ""{i % 2}""\n really"\n' for i in range(8))
    data = load_dataset(written('"a, or\nso","b;c;d",y\n' + rows))
    assert data.feature_names == ("a, or\nso", "b;c;d")
    assert np.array_equal(data.X, TABLE)
    assert data.y.tolist() == [f'yes, "{i % 2}"\n really' for i in range(8)]


def test_a_delimiter_in_quotes_is_none():
    data = load_dataset(written(table(header='"a;;;",b,y\n')))
    assert is_the_table(data)
    assert data.feature_names == ("a;;;", "b")


@pytest.mark.parametrize("column", ["price", "2"])
def test_the_target_may_stand_in_the_middle(column):
    rows = "".join(f"{i},{i / 4},{i * i % 7}\n" for i in range(8))
    data = load_dataset(written("a,price,b\n" + rows), target_column=column)
    assert is_the_table(data)
    assert (data.feature_names, data.target_name) == (("a", "b"), "price")


def test_the_target_by_number_where_there_is_no_header():
    rows = "".join(f"{i / 4},{i},{i * i % 7}\n" for i in range(8))
    assert is_the_table(load_dataset(written(rows), target_column="1"))


def test_a_name_goes_before_a_number():
    # Only the target's name may be a number: other numbers in the first row make it a row.
    data = load_dataset(written("a,b,1\n10,20,30\n40,50,60\n"), target_column="1")
    assert data.y.tolist() == [30, 60]
    data = load_dataset(written("a,b,c\n10,20,30\n40,50,60\n"), target_column="1")
    assert data.y.tolist() == [10, 40]


def test_a_text_target_without_a_header_and_with_one():
    rows = "".join(f"{i},{i * i % 7},{'even' if i % 2 == 0 else 'odd'}\n" for i in range(8))
    for header, names in ("", ()), ("a,b,parity\n", ("a", "b")):
        data = load_dataset(written(header + rows))
        assert np.array_equal(data.X, TABLE)
        assert data.y.tolist() == ["even", "odd"] * 4
        assert data.feature_names == names
        assert data.task == "classification"


def test_cells_are_numbers_by_one_rule():
    data = load_dataset(written("a,b,y\n 3 ,1e5,-.5\n+3,1E-5, 2. \n"))
    assert np.array_equal(data.X, [[3, 1e5], [3, 1e-5]])
    assert data.y.tolist() == [-0.5, 2.0]
    # Python's float() takes them, NumPy's loadtxt does not
    for cell in "1_000", "１":
        message = fault(written(f"a,b,y\n1,2,3\n4,{cell},5\n"))
        assert f"row 2 (line 3), column 2 (b): '{cell}' is not a number" in message
        assert load_dataset(written(f"a,{cell}x,y\n1,2,3\n")).feature_names == ("a", f"{cell}x")
        data = load_dataset(written(f"a,b,y\n1,2,7\n1,2,{cell}\n"))
        assert data.y.tolist() == ["7", cell]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3), min_size=1, max_size=6
    ),
    st.sampled_from([",", ";", "\t"]),
    st.booleans(),
)
def test_every_float_comes_back_as_it_was(rows, delimiter, header):
    lines = [delimiter.join(["a", "b", "y"])] if header else []
    lines += [delimiter.join(map(repr, row)) for row in rows]
    data = load_dataset(written("\n".join(lines)))
    assert np.array_equal(np.column_stack([data.X, data.y]), np.array(rows))


@pytest.mark.parametrize("header", ["", "a,b,y\n"])
def test_true_and_false_are_one_and_zero(header):
    data = load_dataset(written(header + "True,false,3\nFALSE, TRUE ,4\n"))
    assert data.X.tolist() == [[1, 0], [0, 1]]
    assert data.y.tolist() == [3, 4]
    assert data.feature_names == (("a", "b") if header else ())


# CSV to predict for


def test_columns_are_found_by_name():
    text = "note,y,b,a\n" + "".join(f"n{i},{i / 4},{i * i % 7},{i}\n" for i in range(8))
    data = load_dataset(written(text), feature_names=("a", "b"))
    assert np.array_equal(data.X, TABLE)
    assert (data.y, data.feature_names) == (None, ("a", "b"))


@pytest.mark.parametrize(("header", "names"), [("", ()), ("", ("a", "b")), ("u,v\n", ())])
def test_columns_without_names_are_taken_in_order(header, names):
    text = header + "".join(f"{i},{i * i % 7}\n" for i in range(8))
    assert np.array_equal(load_dataset(written(text), feature_names=names).X, TABLE)


def test_a_table_that_has_some_of_the_names_is_refused():
    message = fault(written("b,A\n1,2\n"), feature_names=("a", "b"))
    assert "lacks the column 'a'" in message


def test_a_table_that_has_none_of_the_names_is_refused():
    """In the order of the file the numbers would be wrong."""
    message = fault(written("C,A B\n1,2\n"), feature_names=("a b", "c"))
    assert "has columns C, A B; the model was trained on a b, c" in message
    wide = written(",".join(f"c{i}" for i in range(64)) + "\n")
    assert "c6, c7, … (64 in all); the model" in fault(wide, feature_names=("a", "b"))


def test_rows_longer_than_the_header_are_refused_also_when_predicting():
    for row in "1,2,3\n", "1\n":
        message = fault(written("a,b\n" + row * 3), feature_names=("a", "b"))
        assert f"row 1 (line 2) has {row.count(',') + 1} columns, expected 2" in message


# CSV: what is refused, and where the fault is


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("\ufeff", "is empty"),
        ("a,b,y\n", "has a header but no rows"),
        ("y\n1\n2\n", "has one column only"),
        ("1\n2\n", "has one column only"),
        (table() + "1,2,3,4\n", "row 9 (line 10) has 4 columns, expected 3"),
        (table() + "1,2\n", "row 9 (line 10) has 2 columns, expected 3"),
        (table() + "\n\n1,2\n", "row 9 (line 12) has 2 columns, expected 3"),
        ("a,b,y\n1,2,3,4\n1,2,3,4\n", "row 1 (line 2) has 4 columns, expected 3"),
        ("a,b,c,y\n1,2,3\n1,2,3\n", "row 1 (line 2) has 3 columns, expected 4"),
        (table(3) + "1,cat,2\n", "row 4 (line 5), column 2 (b): 'cat' is not a number"),
        (table(3, header="") + "1,cat,2\n", "row 4 (line 4), column 2: 'cat' is not a number"),
        (table(3) + "1,,2\n", "row 4 (line 5), column 2 (b) is empty"),
        (table(3) + "1,2,\n", "row 4 (line 5), column 3 (y) is empty"),
        (table(3) + "1,2, \n", "row 4 (line 5), column 3 (y) is empty"),
        (table(3) + "nan,2,1\n", "row 4 (line 5), column 1 (a) is nan, not finite"),
        (table(3) + "1,-inf,1\n", "row 4 (line 5), column 2 (b) is -inf, not finite"),
        (table(3) + "1,1e999,1\n", "row 4 (line 5), column 2 (b) is 1e999, not finite"),
        (table(3) + "1,2,NaN\n", "row 4 (line 5), column 3 (y) is NaN, not finite"),
        (table(3, header="") + "1,2,inf\n", "row 4 (line 4), column 3 is inf, not finite"),
        ('"a\n2","b",y\n1,2,3\n1,x,3\n', "row 2 (line 4), column 2 (b): 'x' is not a number"),
        ("a,a,y\n1,2,3\n", "several columns named 'a'"),
        ("y,b,y\n1,2,3\n", "several columns named 'y'"),
        # an index, as pandas and R write it
        (",b,y\n0,2,3\n", "column 1 has no name: leave it out, in pandas to_csv(index=False)"),
        ('"","b","y"\n"1",2,x\n', "column 1 has no name: leave it out"),
        ("a,,y\n1,2,3\n", "column 2 has no name: name it, or leave it out"),
        ("a;b;\n1;2;\n", "column 3 has no name: if each line ends with a ';', remove that"),
        ("1,2,\n3,4,\n", "column 3 is empty: remove the row, or fill in a number; if each line"),
        ("1,,2\n3,4,5\n", "row 1 (line 1), column 2 is empty: remove the row, or fill in a"),
        ("id,2020,price\n1,2,3\n", "a header with numbers for names ('id' stands over 1): rename"),
        ("2019,2020,price\n1,2,3\n", "header with numbers for names ('price' stands over 3)"),
        (table(3) + "1,Oslo,2\n", "'Oslo' is not a number: remove the column, or code it as num"),
        (table(3) + "NA,1,2\n", "'NA' is not a number: remove the row, or fill in a number"),
        (table(3) + "1,nan,2\n", "is nan, not finite: remove the row, or fill in a number"),
        ("a;y\n0,1257;2\n", "column 1 (a): '0,1257' is not a number: write a decimal point"),
        ("a,b,y\nTrue,1,2\n0.5,1,2\n", "row 2 (line 3), column 1 (a): '0.5' is neither true"),
        ("a,b,y\n1,1,2\nTrue,1,2\n", "row 2 (line 3), column 1 (a): 'True' is not a number"),
        (table().encode("utf-16"), "is not a text file"),
        (table(header="é,b,y\n").encode("latin-1"), "is not a text file"),
        ((table(9000) + "1,é,2\n").encode("latin-1"), "is not a text file in UTF-8"),
    ],
)
def test_the_place_of_a_fault_is_named(text, expected):
    assert expected in fault(written(text))


def test_where_the_target_is_named_wrongly_the_columns_are_named():
    message = fault(written("size,price,age\n1,2,3\n"), target_column="prize")
    assert "did you mean 'price'? Known: age, price, size" in message
    for column in "0", "4", "-1", "²":
        assert "unknown column" in fault(written("a,b,y\n1,2,3\n"), target_column=column)


def test_a_fault_in_an_unused_column_is_none():
    text = "name,a,b\nx,1,2\n,3,4\nnan,5,6\n"
    assert load_dataset(written(text), feature_names=("a", "b")).X.tolist() == [
        [1, 2],
        [3, 4],
        [5, 6],
    ]


def test_text_among_many_numbers_to_be_predicted_is_a_mistake_not_a_class():
    text = "a,b,y\n" + "".join(f"{i},1,{i / 3}\n" for i in range(50)) + "1,2,n/a\n"
    assert "'n/a' in row 51" in fault(written(text))


def test_names_of_files_that_cannot_be_read():
    Path("folder.csv").mkdir()
    assert "there is no file folder.csv" in fault("folder.csv")
    assert "there is no file none.csv" in fault("none.csv")
    assert "expected a file ending in .csv, .npz or .npy" in fault(written("1,2\n", "table.xlsx"))


# Arrays


def saved(name: str, **arrays) -> str:
    np.savez(name, **arrays)
    return name


def test_npz_and_npy_are_read_in_every_numeric_type():
    X, y = TABLE, np.arange(8) % 2
    for dtype in "f2", "f4", "f8", "i1", "u2", "i8", ">f4", ">i4":
        data = load_dataset(saved("a.npz", X=X.astype(dtype), y=y.astype(dtype)))
        assert (data.X.dtype, data.y.dtype) == (np.float64, np.float64)
        assert np.array_equal(data.X, X)
        assert np.array_equal(data.y, y)
    assert np.array_equal(load_dataset(saved("a.npz", x=X > 2, Y=y)).X, X > 2)
    np.save("X.npy", np.asfortranarray(X))
    np.save("y.npy", y[:, None])
    data = load_dataset("X.npy", "y.npy")
    assert np.array_equal(data.X, X)
    assert data.y.shape == (8,)
    assert load_dataset("X.npy").y is None


@pytest.mark.parametrize(
    ("X", "y", "expected"),
    [
        (np.ones((3, 2)), np.ones(4), "X in a.npz has 3 rows, y has 4"),
        (np.ones(3), np.ones(3), "expected (n_samples, n_features)"),
        (np.ones((3, 2, 2)), np.ones(3), "X.reshape(len(X), -1)"),
        (np.ones((0, 2)), np.ones(0), "is empty"),
        (np.ones((3, 0)), np.ones(3), "is empty"),
        (np.array([["a", "b"]]), np.ones(1), "is not numeric"),
        (np.ones((3, 2), complex), np.ones(3), "is not numeric"),
        (np.ones((3, 2), "M8[s]"), np.ones(3), "is not numeric"),
        (np.ones((3, 2)), np.ones(3, complex), "neither numbers nor text"),
        (np.ones((3, 2)), np.ones((3, 2, 2)), "y in a.npz has shape (3, 2, 2)"),
        (np.array([[0, 1], [2, np.nan]]), np.ones(2), "X in a.npz: row 1, column 1"),
        (np.array([[0, 1], [-np.inf, np.nan]]), np.ones(2), "row 1, column 0"),
        (np.ones((3, 2)), np.array([1, 2, np.inf]), "y in a.npz: row 2, column 0"),
        (np.ones((3, 2)), np.array([[1, 2], [1, np.nan], [0, 0]]), "y in a.npz: row 1, column 1"),
    ],
)
def test_arrays_that_are_no_data(X, y, expected):
    assert expected in fault(saved("a.npz", X=X, y=y))


def test_an_archive_without_x_says_what_it_has():
    assert "it has: data, labels" in fault(saved("a.npz", data=TABLE, labels=TARGET))
    np.savez("empty.npz")
    assert "it has: none" in fault("empty.npz")


class Bomb:
    """Makes a file as soon as a pickle of it is read."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("where", ["X", "y"])
def test_an_object_array_is_never_unpickled(where):
    arrays = {"X": TABLE, "y": TARGET, where: np.array([Bomb()] * 8, dtype=object)}
    assert "object array" in fault(saved("a.npz", **arrays))
    np.save("X.npy", arrays["X"], allow_pickle=True)
    np.save("y.npy", arrays["y"], allow_pickle=True)
    with pytest.raises(DataError, match=f"{where}.npy holds an object array"):
        load_dataset("X.npy", "y.npy")
    assert not Path("exploded").exists()
    np.load("a.npz", allow_pickle=True)[where]  # the proof that it would have
    assert Path("exploded").exists()


@pytest.mark.parametrize("kind", ["plain.npz", "packed.npz", "X.npy"])
def test_a_truncated_or_damaged_file_is_refused_and_nothing_else_happens(kind):
    np.savez("plain.npz", X=TABLE, y=TARGET)
    np.savez_compressed("packed.npz", X=TABLE, y=TARGET)
    np.save("X.npy", TABLE)
    whole = Path(kind).read_bytes()
    for length in range(0, len(whole), 13):
        fault(written(whole[:length], kind))
    rng = random.Random(7)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with suppress(DataError):  # some damage cannot be seen
            load_dataset(written(bytes(damaged), kind))


def test_a_file_of_another_kind_than_its_name_says():
    np.save("X.npy", TABLE)
    Path("X.npy").rename("X.npz")
    assert "name it .npy" in fault("X.npz")
    saved("a.npz", X=TABLE)
    Path("a.npz").rename("a.npy")
    assert "name it .npz" in fault("a.npy")
    assert "is damaged" in fault(written("1,2\n3,4\n", "text.npy"))
    assert "is damaged" in fault(written("1,2\n3,4\n", "text.npz"))
    with zipfile.ZipFile("bytes.npz", "w") as archive:
        archive.writestr("X", "1,2")
        archive.writestr("y", "1")
    assert "not arrays" in fault("bytes.npz")


# What is to be learned


@pytest.mark.parametrize(
    ("y", "task"),
    [
        (np.arange(100.0) % 10, "classification"),
        (np.arange(100.0) % 30, "classification"),
        (np.arange(100.0) % 31, "regression"),
        (np.arange(6.0), "regression"),  # as many values as rows
        (np.arange(100) % 10 + 0.5, "regression"),
        (np.arange(100) % 2 * 1e300, "regression"),  # whole, but no classes
        (np.array(["a", "b"] * 9), "classification"),
        (np.array([True, False] * 9), "classification"),
        (np.zeros((9, 2)), "regression"),
    ],
)
def test_classes_are_told_from_numbers(y, task):
    assert Dataset("t", np.zeros((len(y), 1)), y).task == task


# Splitting


def test_split_holds_out_the_stated_share_of_each_class_and_loses_no_row():
    X, y = np.arange(100.0)[:, None], np.arange(100) % 4
    X_train, X_test, y_train, y_test = split(X, y, test_fraction=0.2, seed=3, stratify=True)
    assert np.bincount(y_test).tolist() == [5] * 4
    assert sorted(np.concatenate([X_train, X_test])[:, 0]) == list(range(100))
    assert np.array_equal(X_train[:, 0] % 4, y_train)
    assert np.array_equal(X_test[:, 0] % 4, y_test)
    again = split(X, y, test_fraction=0.2, seed=3, stratify=True)
    assert np.array_equal(again[1], X_test)
    assert not np.array_equal(split(X, y, seed=4, stratify=True)[1], X_test)


@pytest.mark.parametrize(
    ("y", "fraction", "expected"),
    [
        (["a"] * 10, 0.2, "all 10 rows are of class a"),
        (["a"] * 9 + ["b"], 0.2, "class b has one row only"),
        ([1.0] * 9 + [-1.0], 0.2, "class -1 has one row only"),
        (["a"] * 1000, 0.2, "all 1,000 rows are of class a"),
        (["a", "b", "c"], 0.5, "has one row only"),
        (["a", "b", "c", "d"] * 2, 0.2, "4 classes are too many to hold out 2 of 8 rows"),
        (["a", "b", "c", "d"] * 2, 0.8, "4 classes are too many to hold out 7 of 8 rows"),
        (["a", "b"], 0.99, "leaves none to train on"),
        (["a"], 0.5, "leaves none to train on"),
    ],
)
def test_what_cannot_be_split_is_refused(y, fraction, expected):
    with pytest.raises(DataError) as caught:
        split(np.zeros((len(y), 1)), np.array(y), test_fraction=fraction, stratify=True)
    assert expected in str(caught.value)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_a_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="test_fraction must be between 0 and 1"):
        split(np.zeros((4, 1)), np.zeros(4), test_fraction=fraction, stratify=False)


# Preprocessing


def test_features_become_standardised_and_a_constant_column_zero(rng):
    X = np.column_stack([rng.normal(5, 3, 50), np.full(50, 0.1), rng.normal(-1e6, 1e-2, 50)])
    fitted = Preprocessing.fit(X, np.arange(50) % 2, "classification")
    features = fitted.features(X)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(features.std(axis=0), [1, 0, 1], rtol=1e-4, atol=1e-6)
    assert fitted.scale[1] == 1  # not the 1e-17 that rounding leaves
    assert fitted.features(X + np.array([0, 1, 0]))[0, 1] == pytest.approx(1)


@pytest.mark.parametrize("same_unit", [False, True])
def test_constant_features_are_said(rng, same_unit):
    X = np.column_stack([np.full(9, 0.1), rng.normal(size=9), np.zeros(9)])
    y = np.arange(9) % 2
    fitted = Preprocessing.fit(X, y, "classification", same_unit=same_unit)
    assert fitted.constant_features == (0, 2)
    assert repr(fitted) == (
        "Preprocessing(3 features, 2 of them constant and kept as zeros: 0, 2; classes: 0, 1)"
    )
    assert not fitted.features(X)[:, [0, 2]].any()
    assert Preprocessing.from_arrays(*fitted.to_arrays()).constant_features == (0, 2)
    named = Preprocessing.fit(X, X[:, 1], "regression", feature_names=("a", "b", "c"))
    assert named.constant_names == ("a", "c")
    varying = Preprocessing.fit(X[:, 1:2], X[:, 1], "regression")
    assert repr(varying) == "Preprocessing(1 feature; regression)"


MATRIX = np.arange(8.0).reshape(4, 2)
HOLE = np.where(MATRIX == 5, np.nan, MATRIX)
NAMES = np.array(["b", "a", "b", "a"])


@pytest.mark.parametrize(
    ("X", "y", "task", "error", "expected"),
    [
        (HOLE, NAMES, "classification", DataError, "features: row 2, column 1 .* is nan"),
        (MATRIX, HOLE[:, 1], "regression", DataError, "target: row 2, column 0 .* is nan"),
        (MATRIX, HOLE[:, 1], "classification", DataError, "class in row 2 .* is missing"),
        (MATRIX, [None, "a", "b", "a"], "classification", DataError, "class in row 0 .* is miss"),
        (MATRIX, np.array([1, "a", 2, "a"], object), "classification", DataError, "all text or"),
        (MATRIX.astype(str), NAMES, "classification", DataError, "of type <U32, not numbers"),
        (MATRIX, NAMES, "regression", DataError, "target are of type <U1, not numbers"),
        (MATRIX.astype(complex), NAMES, "classification", DataError, "complex128, not numbers"),
        (MATRIX[:, 0], NAMES, "classification", ValueError, r"shape \(4,\), expected"),
        (MATRIX[:0], NAMES[:0], "classification", ValueError, r"shape \(0, 2\), expected"),
        (MATRIX, NAMES[:3], "classification", ValueError, "X has 4 rows, y has 3"),
        (MATRIX, NAMES[:, None], "classification", ValueError, r"y has shape \(4, 1\)"),
        (MATRIX, NAMES, "clasification", ValueError, "did you mean 'classification'"),
        (MATRIX.tolist(), NAMES, "classification", TypeError, "expected an array"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_tables_that_cannot_be_prepared(X, y, task, error, expected):
    with pytest.raises(error, match=expected):
        Preprocessing.fit(X, y, task)


def test_tables_unlike_the_training_data_are_refused():
    fitted = Preprocessing.fit(MATRIX, NAMES, "classification")
    assert fitted.targets(list(NAMES)).tolist() == [1, 0, 1, 0]
    with pytest.raises(DataError, match=r"features: row 2, column 1 .* is nan, not finite"):
        fitted.features(HOLE)
    with pytest.raises(ValueError, match="the training data had 2 features"):
        fitted.features(MATRIX[:, :1])  # which NumPy would broadcast
    with pytest.raises(ValueError, match="the training data had 2 classes"):
        fitted.answers(np.eye(3))
    with pytest.raises(DataError, match=r"class in row 1 .* is missing"):
        fitted.targets(np.array(["a", None], object))
    with pytest.raises(ValueError, match=r"y has shape \(4, 1\), expected a class for each"):
        fitted.targets(NAMES[:, None])
    numbers = Preprocessing.fit(MATRIX, MATRIX, "regression")
    with pytest.raises(ValueError, match="the training data had 2 outputs"):
        numbers.targets(MATRIX[:, 0])
    with pytest.raises(ValueError, match="had 2 numbers to be predicted"):
        numbers.answers(MATRIX[:, :1])


def test_one_unit_for_all_features_keeps_their_proportions(rng):
    X = rng.normal(size=(50, 2)) * [3, 4]
    fitted = Preprocessing.fit(X, X[:, 0], "regression", same_unit=True)
    expected = np.sqrt((X.var(axis=0)).mean())
    np.testing.assert_allclose(fitted.scale, [expected, expected])
    constant = Preprocessing.fit(np.full((9, 2), 0.1), X[:9, 0], "regression", same_unit=True)
    assert constant.scale.tolist() == [1, 1]


@pytest.mark.parametrize(
    "y",
    [
        np.array(["b", "a", "c", "a"]),
        np.array([3.0, -1.0, 7.0, 3.0]),
        np.array([0.5, -1.5, 7.0, 0.5]),
        np.array([True, False, True, False]),
    ],
)
def test_classes_become_labels_and_back(y):
    fitted = Preprocessing.fit(np.zeros((4, 1)), y, "classification")
    labels = fitted.targets(y)
    assert labels.dtype.kind == "i"
    assert np.array_equal(np.unique(y)[labels], y)
    assert np.array_equal(fitted.answers(np.eye(fitted.n_outputs)[labels]), y)
    assert fitted.task == "classification"
    with pytest.raises(DataError, match="is not among those"):
        fitted.targets(np.array(["zz"] if y.dtype.kind == "U" else [99.0]))


def test_a_whole_class_is_shown_without_a_decimal_point():
    classes = Preprocessing.fit(np.zeros((2, 1)), np.array([7.0, 3.0]), "classification").classes
    assert list(map(repr, classes)) == ["3", "7"]


def test_outputs_come_back_in_the_unit_of_the_target(rng):
    y = rng.normal(size=(20, 2)) * [1000, 0.01] + [5e4, 3]
    fitted = Preprocessing.fit(rng.normal(size=(20, 3)), y, "regression")
    targets = fitted.targets(y)
    np.testing.assert_allclose(targets.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(targets.std(axis=0), 1, rtol=1e-5)
    np.testing.assert_allclose(fitted.answers(targets), y, rtol=1e-5)
    assert (fitted.task, fitted.n_outputs) == ("regression", 2)


@pytest.mark.filterwarnings("error")
def test_numbers_too_large_for_the_arithmetic_are_refused_with_their_column():
    X = np.column_stack([np.arange(9.0), np.linspace(-1, 1, 9) * 1e308])
    with pytest.raises(DataError, match=r"column 1 \(counted from 0\) has numbers up to 1e\+308"):
        Preprocessing.fit(X, X[:, 0], "regression")
    with pytest.raises(DataError, match=r"the target: column 0 .* up to 1e\+308"):
        Preprocessing.fit(X[:, :1], X[:, 1], "regression")
    fitted = Preprocessing.fit(X[:, :1], X[:, 0], "regression")
    with pytest.raises(DataError, match=r"1e\+100 in column 0 .* is too far"):
        fitted.features(np.array([[1.0], [1e100]]))
    with pytest.raises(DataError, match=r"the target: 1e\+100 in column 0"):
        fitted.targets(np.array([1e100]))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"classes": ["a", 1]}, "all text or all numbers"),
        ({"classes": [None, None]}, "all text or all numbers"),
        ({"classes": [["a"], ["b"]]}, "all text or all numbers"),
        ({"classes": ["b", "a"]}, "sorted and different"),
        ({"classes": ["a", "a"]}, "sorted and different"),
        ({"classes": []}, "expected arrays"),
        ({"feature_names": ["a"]}, "2 features have 1 names"),
        ({"feature_names": ["a", 3]}, "must be text"),
        ({"target_name": None}, "must be text"),
        ({"constant_features": [2]}, "must be numbers of columns"),
        ({"constant_features": ["a"]}, "must be numbers of columns"),
    ],
)
def test_preprocessing_that_fit_cannot_have_made_is_refused(change, expected):
    X, y = np.arange(8.0).reshape(4, 2), np.array(["a", "b"] * 2)
    arrays, options = Preprocessing.fit(X, y, "classification").to_arrays()
    assert Preprocessing.from_arrays(arrays, options).classes == ("a", "b")
    with pytest.raises(ValueError, match=expected):
        Preprocessing.from_arrays(arrays, options | change)
    fewer = {k: v for k, v in options.items() if k not in change}
    if "constant_features" in change:  # files of earlier versions lack them
        assert Preprocessing.from_arrays(arrays, fewer).constant_features == ()
        return
    with pytest.raises(KeyError):
        Preprocessing.from_arrays(arrays, fewer)
