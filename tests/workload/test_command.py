"""`kvtune trace` as users run it: verbs, exit codes, what goes to which stream, hostile files."""

import gzip
import json
import os
import resource
import subprocess
import sys
import time
import zlib

import pytest
from process_time import assert_starts_within

from kvtune.cli.main import main

POLICY = "Answer briefly, cite the manual and never guess. " * 20


def trace(capsys, *arguments):
    code = main(["trace", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def write(folder, name, *rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mooncake(folder, count=2, **fields):
    rows = [
        {"timestamp": 1500 * i, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]}
        for i in range(count)
    ]
    return write(folder, "m.jsonl", *({**row, **fields} for row in rows))


def chats(folder, system):
    return write(folder, "c.jsonl", *(
        {"messages": [{"role": "system", "content": system(i)}, {"role": "user", "content": f"question {i}"}]}
        for i in range(30)
    ))  # fmt: skip


def timed(i):
    return f"It is 2026-11-22T08:{i:02d}:00Z. {POLICY}"


def test_a_file_alone_means_statistics(tmp_path, capsys):
    path = mooncake(tmp_path)
    code, out, err = trace(capsys, path, "--trace-block-size", 512, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert (report["format"], report["num_requests"]) == ("mooncake", 2)
    assert report["prefix"]["ideal_block_hit_rate"] == 0.5
    assert report == json.loads(trace(capsys, "stats", path, "--trace-block-size", 512, "--json")[1])
    assert report == json.loads(trace(capsys, "--trace-block-size", 512, "--json", path)[1])


def test_the_table_for_people_has_the_figures_of_the_object(tmp_path, capsys):
    code, out, _ = trace(capsys, mooncake(tmp_path, count=40), "--trace-block-size", 512)
    assert code == 0
    for figure in ("requests   40", "78 of 80", "p50 600", "97.5% of blocks", "kvtune trace lint"):
        assert figure in out, out
    assert all(len(line) < 200 for line in out.splitlines())


def test_a_block_size_the_rows_do_not_tell_is_asked_for(tmp_path, capsys):
    code, out, err = trace(capsys, mooncake(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--trace-block-size" in err
    code, out, _ = trace(capsys, mooncake(tmp_path), "--json")
    assert code == 2 and json.loads(out)["error"]["exit_code"] == 2


def test_what_is_odd_goes_to_stderr_and_into_the_object(tmp_path, capsys):
    code, out, err = trace(capsys, mooncake(tmp_path, colour=1), "--trace-block-size", 512, "--json")
    assert code == 0
    assert err.startswith("kvtune: warning: columns unknown in mooncake are ignored: 'colour'")
    assert err.count("\n") == 1
    assert json.loads(out)["warnings"] == [err.strip().removeprefix("kvtune: warning: ")]


def test_lint_exits_1_on_a_breakage_and_0_without(tmp_path, capsys):
    path = chats(tmp_path, timed)
    code, out, _ = trace(capsys, "lint", path, "--json")
    report = json.loads(out)
    assert (code, report["verdict"]) == (1, "broken")
    (finding,) = report["findings"]
    assert finding["rule"] == "timestamp"
    assert finding["position"] == {"message": 0, "role": "system", "character": 20, "token": 6}
    assert finding["fix"] and finding["title"] and finding["samples"]
    code, out, _ = trace(capsys, "lint", path)
    assert code == 1
    assert (
        "error  timestamp" in out and "message 0 (system), character 20" in out and "'2026-11-22T08:" in out
    )
    code, out, _ = trace(capsys, "lint", path, "--max-loss", "99%")
    assert code == 0 and "note   timestamp" in out
    code, out, _ = trace(capsys, "lint", chats(tmp_path, lambda i: POLICY))
    assert code == 0 and "nothing found" in out


def test_lint_refuses_what_it_cannot_judge(tmp_path, capsys):
    path = write(tmp_path, "l.jsonl", {"timestamp": 0, "input_length": 5})
    for arguments in ((path,), (chats(tmp_path, timed), "--max-loss", "much"), (path, "--max-loss", "2")):
        code, out, err = trace(capsys, "lint", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_prompt_cannot_write_to_the_terminal(tmp_path, capsys):
    path = chats(
        tmp_path, lambda i: f"\x1b[2J\x1b]0;owned\x07 it is 2026-11-22T08:{i:02d}:00Z\x1b[1m {POLICY}"
    )
    assert "\x1b" not in trace(capsys, "lint", path)[1]


def test_forecast_compares_with_what_came(tmp_path, capsys):
    rows = [
        {"timestamp": 100 * i, "input_length": 64, "hash_ids": [0, 1 + i % 7, 100 + i % 7, 1000 + i]}
        for i in range(1200)
    ]
    path = write(tmp_path, "m.jsonl", *rows)
    arguments = ("forecast", path, "--trace-block-size", 16, "--capacity-blocks", "50,inf")
    code, out, _ = trace(capsys, *arguments, "--json")
    report = json.loads(out)
    assert code == 0
    assert [f["capacity_blocks"] for f in report["forecasts"]] == [50, None]
    for found in report["forecasts"]:
        assert (found["status"], found["num_history"]) == ("stationary", 600)
        assert found["hit_rate"] == pytest.approx(0.75, abs=0.01)
        assert abs(found["error"]) < 0.01
    table = trace(capsys, *arguments)[1]
    assert "75.0%" in table and "unbounded" in table
    code, _, err = trace(capsys, "forecast", path, "--trace-block-size", 16, "--capacity-blocks", "0")
    assert code == 2 and "at least 1, or inf" in err


def test_anonymise_by_verb_or_by_option_writes_what_replays_alike(tmp_path, capsys):
    path = chats(tmp_path, timed)
    salt = tmp_path / "salt"
    salt.write_bytes(bytes(32))
    code, out, _ = trace(capsys, "anonymise", path, tmp_path / "a.jsonl", "--salt-file", salt, "--json")
    assert code == 0 and json.loads(out)["num_requests"] == 30
    code, out, _ = trace(capsys, path, "--anonymise", tmp_path / "b.jsonl", "--json")
    assert code == 0 and json.loads(out)["anonymised"]["block_size"] == 16
    hits = [
        json.loads(trace(capsys, name, "--json")[1])["prefix"]["hit_blocks"]
        for name in (path, tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    ]
    assert len(set(hits)) == 1
    assert "manual" not in (tmp_path / "a.jsonl").read_text() + (tmp_path / "b.jsonl").read_text()
    assert (tmp_path / "a.jsonl").read_bytes() != (tmp_path / "b.jsonl").read_bytes()  # another salt


def test_the_file_itself_is_never_overwritten_and_weak_salts_are_refused(tmp_path, capsys):
    path = chats(tmp_path, timed)
    before = path.read_bytes()
    assert trace(capsys, "anonymise", path, path)[0] == 2
    (tmp_path / "salt").write_bytes(b"short")
    code, _, err = trace(capsys, "anonymise", path, tmp_path / "o", "--salt-file", tmp_path / "salt")
    assert code == 2 and "at least 16 bytes" in err
    assert trace(capsys, "anonymise", path, tmp_path / "o", "--salt-file", tmp_path / "absent")[0] == 2
    assert path.read_bytes() == before and not (tmp_path / "o").exists()


ENVIRONMENT = {**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
MEMORY = 1_500_000_000


def bounded(path, *arguments):
    """Run the command with its address space bounded; (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "kvtune", "trace", str(path), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )
    return done.returncode, done.stdout, done.stderr


def packed(chunk, repeats):
    """gzip of `chunk` repeated, made without holding it."""
    packer = zlib.compressobj(1, wbits=31)
    return b"".join([*(packer.compress(chunk) for _ in range(repeats)), packer.flush()])


ROW = b'{"timestamp": 0, "input_length": 16, "output_length": 1, "hash_ids": [1]}\n'
BOMBS = {
    "one_line_of_10_GB": lambda: packed(b"x" * 2**20, 100),
    "a_list_that_never_ends": lambda: b"[" + b'{"prompt": "' + b"x" * 40_000_000,
    "blank_lines": lambda: packed(b"\n" * 2**20, 100),
    "rows": lambda: packed((b" " * 2000 + ROW) * 500, 60),
    "rows_of_one_list": lambda: b"\x1f\x8b" + packed(b"[" + ROW.strip() + b"," + b" " * 2**20, 100)[2:],
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_one_line_within_bounded_memory(tmp_path, name):
    path = tmp_path / "bomb"
    path.write_bytes(BOMBS[name]())
    code, out, err = bounded(path, "--trace-block-size", "16")
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and len(err) < 500, err


def test_a_sparse_file_with_a_line_of_10_gb_is_refused_at_once(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b'{"prompt": "')
        file.truncate(10 * 2**30)
    code, _, err = bounded(path)
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize(
    "rows",
    [
        '{"timestamp": NaN, "input_length": 5, "hash_ids": [1]}',
        '{"timestamp": -1, "input_length": 5, "hash_ids": [1]}',
        '{"timestamp": 1e400, "input_length": 5, "hash_ids": [1]}',
        '{"timestamp": 0, "input_length": 5, "hash_ids": [1, 2, 3]}',
        '{"timestamp": 0, "input_length": 4000000000000000000, "hash_ids": [1]}',
        '{"timestamp": 0, "input_length": 5, "hash_ids": [18446744073709551616]}',
        '{"request_id": "a", "arrival_s": 0, "input_length": 4000000000000000000}\n'
        '{"request_id": "b", "arrival_s": 0, "prompt": "x"}',
        '{"request_id": "a", "arrival_s": 0, "input_length": 5, "hash_ids": [1, 2], "hash_lengths": [1]}',
        '{"prompt_tokens": 5, "output_tokens": 5, "samples": 4000000000}',
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,nan,1",
        "TIMESTAMP,ContextTokens,TIMESTAMP\n2023-11-16 18:15:46,1,1",
    ],
)  # fmt: skip
def test_impossible_values_are_refused_in_one_line(tmp_path, capsys, rows):
    path = tmp_path / "bad"
    path.write_text(rows + "\n")
    code, out, err = trace(capsys, path, "--trace-block-size", 16)
    assert (code, out) == (2, ""), (out, err)
    assert err.count("\n") == 1 and "Traceback" not in err and len(err) < 500


def test_duplicate_ids_and_times_that_run_backwards_are_a_line_each(tmp_path, capsys):
    row = {"input_length": 5, "hash_ids": [1], "request_id": "same"}
    path = write(tmp_path, "m.jsonl", {**row, "timestamp": 9}, {**row, "timestamp": 3})
    code, _, err = trace(capsys, path, "--trace-block-size", 16)
    assert code == 0
    assert [line.split(": ", 2)[1] for line in err.splitlines()] == ["warning", "warning"]


def test_many_equal_ids_take_time_in_proportion_to_their_number(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"id": "same", "prompt": "x"}\n' * 20_000)
    begin = time.process_time()
    assert main(["trace", str(path), "--json"]) == 0
    assert time.process_time() - begin < 30


def test_the_command_starts_within_a_third_of_a_second_of_numpy(tmp_path):
    command = ["trace", str(mooncake(tmp_path)), "--trace-block-size", "512", "--json"]
    assert_starts_within(0.3, "-c", f"from kvtune.cli.main import main; main({command!r})", env=ENVIRONMENT)


def test_a_file_needs_no_torch_pandas_or_rich_to_be_read(tmp_path):
    path = mooncake(tmp_path)
    code = (
        "import sys, json; from kvtune.cli.main import main\n"
        f"main(['trace', {str(path)!r}, '--trace-block-size', '512'])\n"
        "heavy = [m for m in ('torch', 'transformers', 'pandas', 'scipy') if m in sys.modules]\n"
        "print(heavy, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert done.stderr.strip() == "[]"


def test_packed_files_are_read_without_their_name_saying_so(tmp_path, capsys):
    path = tmp_path / "m.jsonl"
    path.write_bytes(gzip.compress(ROW * 3))
    assert trace(capsys, path, "--trace-block-size", 16)[0] == 0
