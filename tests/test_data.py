"""Data: every row is a problem with an answer that can be right, or it is skipped and counted."""

import copy
import datetime
import decimal
import io
import json
import re
import sys

import datasets
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers.processors import TemplateProcessing

import real
from common import QUICK, main, one_line
from real import Config, UserError

TOKENIZER = real.AutoTokenizer.from_pretrained(real.TINY)


def load(rows, tmp_path, tokenizer=TOKENIZER, suffix="jsonl", **settings):
    """Problems of rows (bytes: the file as it is)."""
    file = tmp_path / f"data.{suffix}"
    if isinstance(rows, list):
        rows = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(rows)
    return real.load_problems(tokenizer, Config(**settings), str(file), "train")


def refused(rows, tmp_path, **more):
    with pytest.raises(UserError) as e:
        load(rows, tmp_path, **more)
    assert one_line(e.value) and "data." in str(e.value)
    return str(e.value)


GOOD = {"problem": "1+1", "answer": "2"}


@pytest.mark.parametrize("answer", [
    None, "", " ", [], [[]], [["2"]], {}, {"a": 2}, [{"a": 2}], float("nan"),
    [None], [""], [float("nan")], "so #### ", "####"], ids=repr)
def test_an_answer_that_can_never_be_right_is_skipped_and_counted(answer, tmp_path, capsys):
    rows = [GOOD, {"problem": "2+2", "answer": answer}, GOOD, {"problem": "3+3", "answer": answer}]
    assert [p["problem"] for p in load(rows, tmp_path)] == ["1+1", "1+1"]
    assert "2 usable rows of 4; row 2 lacks" in capsys.readouterr().out


@pytest.mark.parametrize("row", [
    *({"problem": problem, "answer": "2"} for problem in (
        None, "", " \n", [], {}, [[]], float("nan"), [{"role": "user"}], [{"content": None}])),
    {"answer": "2"}, {}, [], None, 3, "problem", ["problem", "answer"]], ids=repr)
def test_a_row_without_problem_is_skipped(row, tmp_path, capsys):
    assert len(load([GOOD, row], tmp_path)) == 1
    assert "1 usable rows of 2; row 2 lacks" in capsys.readouterr().out


def test_a_misspelt_part_of_joined_columns_is_refused(tmp_path):
    row = {"context": None, "problem": "1+1", "answer": "2"}  # null is no misspelling
    assert load([row], tmp_path, problem_column="context+problem")[0]["problem"] == "1+1"
    said = refused([row], tmp_path, problem_column="contxt+problem")
    assert "--problem_column" in said and "['context', 'problem', 'answer']" in said


def test_empty_lines_between_rows_do_not_matter(tmp_path):
    content = b'\n{"problem": "1+1", "answer": "2"}  \n\n \r\n{"problem": "1+2", "answer": "3"}\n\n'
    assert [p["answer"] for p in load(content, tmp_path)] == ["2", "3"]


def test_a_chat_as_problem_is_read_as_all_that_its_messages_say(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]
    chat, plain = load([{"problem": chat, "answer": "2"},
                        {"problem": "Be brief.\n1+1", "answer": "2"}], tmp_path)
    assert chat == plain


def test_a_list_in_a_list_is_never_half_read(tmp_path, capsys):
    """A chat with parts, of which only the system's message is a text; an answer in a list."""
    parts = [{"role": "system", "content": "Be brief."},
             {"role": "user", "content": [{"type": "text", "text": "1+1"}]}]
    answers = {"problem": "1+2", "answer": [["3"], "4", None]}
    rows = [{"problem": parts, "answer": "2"}, GOOD, answers]
    assert [p["problem"] for p in load(rows, tmp_path)] == ["1+1"]
    assert "1 usable rows of 3; row 1 lacks" in capsys.readouterr().out


def test_a_long_prompt_is_skipped(tmp_path, capsys):
    assert len(load([{"problem": "1+" * 3000, "answer": "2"}, GOOD], tmp_path)) == 1
    assert "row 1 lacks problem or answer, is too long" in capsys.readouterr().out


def test_a_prompt_of_exactly_the_allowed_length_is_kept(tmp_path):
    length = len(load([GOOD], tmp_path)[0]["prompt_ids"])
    assert len(load([GOOD], tmp_path, max_prompt_tokens=length)) == 1
    refused([GOOD], tmp_path, max_prompt_tokens=length - 1)


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}"])
def test_a_first_token_is_added_unless_the_template_writes_it(template, tmp_path):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="first $A", special_tokens=[("first", 7)])
    tokenizer.chat_template = template
    expected = TOKENIZER("1+1" + real.SUFFIX).input_ids
    found = load([GOOD], tmp_path, tokenizer)[0]["prompt_ids"]
    assert found == (expected if template else [7, *expected])


@pytest.mark.parametrize("written", [
    "9223372036854775807", "9223372036854775808", "18446744073709551617", "1" + "0" * 400,
    "0.10", "1.50", "12345678901234567.891", "-7", "1e3", "9" * 5000], ids=lambda x: x[:24])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_numbers_stay_as_written(written, suffix, tmp_path):
    row = f'{{"problem": "1+1", "answer": {written}}}'
    text = {"jsonl": row, "json": f"[\n {row}\n]", "csv": f"problem,answer\n1+1,{written}\n"}
    assert load(text[suffix].encode(), tmp_path, suffix=suffix)[0]["answer"] == written


def test_dates_decimals_and_integers_of_parquet_stay_as_written(tmp_path):
    values = {"d": datetime.date(2024, 1, 5), "x": decimal.Decimal("1.50"), "n": 2**63 - 1,
              "b": True, "t": "007"}
    file = tmp_path / "train.parquet"
    datasets.Dataset.from_list([{"problem": "1+1", **values}]).to_parquet(file)
    for column, value in values.items():
        config = Config(answer_column=column)
        answer = real.load_problems(TOKENIZER, config, str(tmp_path), "train")[0]["answer"]
        assert answer == str(value)


@pytest.mark.parametrize("answer, wanted", [
    ("She has 3 * 4 = <<3*4=12>>12 eggs.\n#### 12", "12"), ("#### 1,000", "1,000"),
    ("a #### 1 #### 2", "2"), ("7", "7"), (["#### 3", "4"], ["3", "4"]), (["5"], "5"),
    ([None, "5"], "5"), (["5", ""], ["5", ""]), (True, "True")])
def test_the_answer_is_what_follows_the_hashes(answer, wanted, tmp_path):
    assert load([{"problem": "1+1", "answer": answer}], tmp_path)[0]["answer"] == wanted
    assert not real.is_correct(r"\boxed{}", wanted)


def test_the_prompt_is_what_the_template_makes(tmp_path):
    found = load([GOOD], tmp_path)[0]
    assert found["opening"] == "<think>"
    assert TOKENIZER.decode(found["prompt_ids"]) == TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "1+1" + real.SUFFIX}], tokenize=False,
        add_generation_prompt=True)


@pytest.mark.parametrize("end, opening", [
    ("<think>", "<think>"), ("<think>\n", "<think>"), ("<think>\n\n</think>\n\n", ""), ("", "")])
def test_opening_is_the_think_that_the_template_wrote(end, opening, tmp_path):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{{ messages[0].content }}" + end
    assert load([GOOD], tmp_path, tokenizer)[0]["opening"] == opening


def test_without_a_template_the_problem_alone_is_the_prompt(tmp_path):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = None
    found = load([GOOD], tmp_path, tokenizer)[0]
    assert found["prompt_ids"] == TOKENIZER("1+1" + real.SUFFIX).input_ids
    assert found["opening"] == ""


def test_the_instruction_is_not_added_twice(tmp_path):
    found = load([GOOD | {"problem": "1+1" + real.SUFFIX}, GOOD], tmp_path)
    assert found[0]["prompt_ids"] == found[1]["prompt_ids"]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_file_format_and_nested_columns(tmp_path, suffix):
    rows = [{"q": f"{i}+1", "a": str(i + 1)} for i in range(3)]
    if suffix != "csv":
        rows = [row | {"extra": None, "prompt": [{"role": "user", "content": row["q"]}],
                       "reward": {"truth": [row["a"]]}} for row in rows]
    file = tmp_path / f"train.{suffix}"
    data = datasets.Dataset.from_list(rows)
    getattr(data, "to_" + suffix.removesuffix("l"))(str(file))
    columns = [("q", "a")] + [("extra+prompt[0].content", "reward.truth[0]")] * (suffix != "csv")
    for problem, answer in columns:
        config = Config(problem_column=problem, answer_column=answer)
        path = tmp_path if suffix == "parquet" else file  # which `datasets` reads
        found = real.load_problems(TOKENIZER, config, str(path), "train")
        assert [(p["problem"], p["answer"]) for p in found] == [
            (f"{i}+1", str(i + 1)) for i in range(3)]


def test_a_folder_holds_a_file_a_split(tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps(GOOD))
    assert len(real.load_problems(TOKENIZER, Config(), str(tmp_path), "mine")) == 1
    with pytest.raises(UserError) as e:
        real.load_problems(TOKENIZER, Config(), str(tmp_path), "other")
    assert one_line(e.value)


BAD = {  # case: (bytes of a .jsonl file, words of the error)
    "another column": (
        b'{"question": "1+1", "answer": "2"}', "columns: ['question', 'answer']"),
    "broken JSON": (b'{"problem": "1+1", "answer": "2"}\n{"problem":\n', "line 2"),
    "not UTF-8": ('{"problem": "é", "answer": "2"}'.encode("latin-1"), "codec"),
    "UTF-16": ('{"problem": "1", "answer": "2"}'.encode("utf-16"), "codec"),
    "empty": (b"", "0 usable rows of 0"), "only blanks": (b"\n \n", "0 usable rows of 0"),
    "no answers": (b'{"problem": "1+1", "answer": ""}', "0 usable rows of 1"),
    "broken after an empty line": (b'{"problem": "1+1", "answer": "2"}\n\n{"a": 1,\n', "line 3"),
    "rows that are numbers": (b"[1]\n", "data"), "rows that are texts": (b'"a"\n"b"', "data"),
    "deep": (b"[" * 100_000, "recursion"), "a surrogate": (
        b'{"problem": "\\ud800", "answer": "2"}', "row 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line_that_names_the_file(case, tmp_path):
    content, words = BAD[case]
    assert words in refused(content, tmp_path)


@pytest.mark.parametrize("content, words", [
    (b"", "0 usable rows"), (b"problem,answer\n", "0 usable rows"),
    (b"problem;answer\n1;2\n", "columns: ['problem;answer']"), (b"\xff\xfe\x00", ""),
    (b'problem,answer\n"1,2\n', "")])
def test_bad_csv_is_one_line(content, words, tmp_path):
    assert words in refused(content, tmp_path, suffix="csv")


@pytest.mark.parametrize("row", ["2+2,4,extra", "2+2,4,more,still", "1+1,1,000", "1+1,2,"])
def test_a_csv_row_with_more_fields_than_the_header_is_skipped(row, tmp_path, capsys):
    """Its fields may have moved, as those of 1,000 without quotes do."""
    found = load(f"problem,answer\n{row}\n1+2,3\n".encode(), tmp_path, suffix="csv")
    assert [(p["problem"], p["answer"]) for p in found] == [("1+2", "3")]
    assert "1 usable rows of 2; row 1 lacks" in capsys.readouterr().out
    refused(f"problem,answer\n{row}".encode(), tmp_path, suffix="csv")


def test_a_csv_file_that_ends_inside_quotes_is_refused(tmp_path):
    """Else the quote would swallow all rows that follow."""
    content = 'problem,answer\n1+1,2\n1+2,"3\n1+3,4\n'
    assert "unexpected end of data" in refused(content.encode(), tmp_path, suffix="csv")


def test_a_csv_row_with_fewer_fields_is_skipped(tmp_path, capsys):
    content = b"\xef\xbb\xbfproblem,answer\n1+1,2\n\n2+2\n3+3,NA\n"  # as Excel begins a file
    found = load(content, tmp_path, suffix="csv")
    assert [(p["problem"], p["answer"]) for p in found] == [("1+1", "2"), ("3+3", "NA")]
    assert "2 usable rows of 3; row 2 lacks" in capsys.readouterr().out


def test_held_out_problems_that_are_trained_on_are_refused(tmp_path):
    file = f"{real.TINY}/test.jsonl"
    for held_out in (file, None):  # not given: the data set itself, another split if it has one
        with pytest.raises(UserError, match="--eval_dataset"):
            real.train(Config(dataset=file, eval_dataset=held_out, output_dir=f"{tmp_path}/run"))


def test_quoted_csv_keeps_commas_and_line_breaks(tmp_path):
    found = load(b'problem,answer\n"f(1, 2)\n=?","1,000"\n', tmp_path, suffix="csv")
    assert (found[0]["problem"], found[0]["answer"]) == ("f(1, 2)\n=?", "1,000")


def test_too_few_problems_are_said_before_anything_is_sampled(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text(3 * (json.dumps(GOOD) + "\n"))
    monkeypatch.setattr(real, "sample", None)
    with pytest.raises(UserError, match="3 usable rows of 3; 4 needed"):
        real.train(Config(dataset=str(tmp_path / "data.jsonl"), prompts=4, eval_every=0,
                          output_dir=str(tmp_path / "run")))


def test_a_column_that_does_not_exist_prints_no_control_characters(tmp_path, capsys):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"\x1b[2Jquestion": "1+1", "a\nb": "2"}))
    with pytest.raises(SystemExit):
        main(*QUICK, "--dataset", file, "--output_dir", tmp_path / "run")
    said = capsys.readouterr().err.splitlines()[-1]
    assert one_line(said) and "question" in said and "a\\\\nb" in said


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["1+1", "#### 2", real.SUFFIX, "content", "role"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["content", "role", "a", real.SUFFIX.strip()]), inner, max_size=3),
    max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(st.lists(json_values | st.fixed_dictionaries(
    {"problem": json_values, "answer": json_values}), max_size=3))
def test_no_row_raises_anything_but_one_line(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    try:
        for problem in load(rows, folder):
            answers = problem["answer"]
            assert problem["problem"].strip() and problem["prompt_ids"] and answers
            answers = answers if isinstance(answers, list) else [answers]
            assert all(isinstance(a, str) for a in answers) and any(a.strip() for a in answers)
    except UserError as e:
        assert str(e)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode),
       suffix=st.sampled_from(["json", "jsonl"]))
def test_no_file_raises_anything_but_one_line(tmp_path_factory, content, suffix):
    with pytest.raises(UserError):
        load(content, tmp_path_factory.mktemp("files"), suffix=suffix)


@given(st.recursive(st.text(max_size=3), lambda x: st.lists(x) | st.dictionaries(st.text(), x)),
       st.text(alphabet="a0123[].+٣²", max_size=9))
def test_no_column_raises(row, column):
    real.read_column({"a": row}, column)


def test_a_number_without_end_in_a_column_is_no_traceback():
    assert real.read_column({"a": ["x"]}, f"a[{'9' * 5000}]") is None


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(0, 3), st.integers(1, 5))
def test_each_pass_over_the_data_sees_every_problem_once(size, seed, prompts):
    config = Config(prompts=prompts, mini_batches=1, seed=seed)
    steps = range(1, 2 * size + 1)  # 2 * prompts passes
    seen = [p["n"] for step in steps
            for p in real.draw([{"n": i} for i in range(size)], step, config)]
    passes = [seen[i : i + size] for i in range(0, len(seen), size)]
    assert all(sorted(p) == list(range(size)) for p in passes)


HOSTILE = {"problem": "1+1 \x1b[2J\x1b]0;owned\x07 é∑語\u202e", "answer": "2"}


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_any_output_encoding_works_and_no_control_character_reaches_it(encoding, tmp_path,
                                                                       monkeypatch):
    (tmp_path / "dâta.jsonl").write_text(4 * (json.dumps(HOSTILE) + "\n"))
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    for name in ("stdout", "__stdout__"):
        monkeypatch.setattr(sys, name, out)
    main(*QUICK, "--dataset", tmp_path / "dâta.jsonl", "--steps", 1,
         "--output_dir", tmp_path / "rün")
    out.flush()
    said = out.buffer.getvalue().decode(encoding)
    assert "1+1" in said and not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", said)
    sample = json.loads((tmp_path / "rün" / "samples.jsonl").read_text())
    assert sample["problem"] == HOSTILE["problem"]


def test_a_parquet_file_is_read_as_it_is_now(tmp_path):
    for answer in ("2", "3"):
        datasets.Dataset.from_list([GOOD | {"answer": answer}]).to_parquet(tmp_path / "x.parquet")
        assert real.load_rows(tmp_path, None, "train") == [GOOD | {"answer": answer}]
