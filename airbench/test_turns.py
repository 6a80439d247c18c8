"""Runs scripts of this folder in turns, so that their times compare, and checks that.

    python airbench/test_turns.py airbench/main7_mirror.py:40 airbench/main8_compile.py:40 --data data

starts each script with that many runs and the flags behind the names. They measure the speed of a large
matmul one after the other, compile all at once, and then take turns of one run each while the others wait; a
script that is through leaves the round and adds its line to results/.
"""
import ast
import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent

def leave(message):
    """With one line on stderr, as the scripts do on wrong use."""
    print(f"test_turns.py: error: {message}", file=sys.stderr)
    sys.exit(2)

def take_part(asks, path, *flags):
    """The script of that path in this process; it asks by a byte to that descriptor and goes on by one from
    stdin: '1' to go on alone, '*' to go on when all others ask so, too."""
    def ask(kind):
        with contextlib.suppress(BrokenPipeError):
            os.write(int(asks), kind)
            if os.read(0, 1):
                return
        sys.exit(f"{path}: stopped, since the process that gives turns is gone")
    sys.argv = [path, *flags]
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    peak_flops, train = module.peak_flops, module.train
    def peak_in_turn(device):
        ask(b"1")
        peak = peak_flops(device)
        ask(b"*")
        return peak
    def train_in_turn(trained, train_set, test_set, run, seed):
        run == "-" or ask(b"1")  # all warm up at once
        return train(trained, train_set, test_set, run, seed)
    module.peak_flops, module.train = peak_in_turn, train_in_turn
    module.ARGS = module.argument_parser().parse_args(flags)
    entry = ast.Module(ast.parse(module.CODE).body[-1].body, [])  # with what the script says of errors
    exec(compile(entry, path, "exec"), vars(module))

def in_turns(names, flags, out=sys.stdout):
    """Run scripts 'PATH:RUNS' in turns. -> [exit code], in the order of their ends; out gets whose turn
    it is, and at the end of each script what it printed."""
    parts, codes, waiting, flags = [], [], {}, list(flags)
    for path in [name.partition(":")[0] for name in names]:  # before any starts
        os.path.exists(path) or leave(f"there is no {path}")
    for name in names:
        path, _, runs = name.partition(":")
        asks, own = os.pipe()
        command = [sys.executable, __file__, "--part", str(own), path, "--runs", runs or "1", *flags]
        log = tempfile.TemporaryFile("w+")
        part = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, pass_fds=[own], bufsize=0)
        os.close(own)
        parts.append((part, path, asks, log))
    while parts:
        for each in [each for each in parts if each not in waiting]:
            part, _, asks, log = each
            if kind := os.read(asks, 1):
                waiting[each] = kind
                continue
            code = part.wait()
            codes.append(code if code >= 0 else 128 - code)  # a signal, as a shell has it
            parts.remove(each)
            log.seek(0)
            print(log.read(), file=out, flush=True)
        alone = [each for each in parts if waiting[each] == b"1"][:1]
        for each in alone or list(parts):
            alone and print(f"{each[1]} goes on", file=out, flush=True)
            parts.remove(each)
            parts.append(each)  # the last to have the next turn
            del waiting[each]
            with contextlib.suppress(BrokenPipeError):  # killed, as the end of its pipe will say
                each[0].stdin.write(b".")
    return codes

def test_scripts_take_turns(tmp_path, monkeypatch):
    """Two scripts of three and two runs alternate until one is through; a third fails without harm."""
    names = [f"{HERE / name}" for name in ("main9_muon.py:3", "main16_silu.py:2", "hlb_cifar10.py:0")]
    sys.path.insert(0, str(HERE.parent))
    from test_smoke import write_cifar
    monkeypatch.setenv("TRITON_INTERPRET", "")
    flags = ["--data", write_cifar(tmp_path / "data"), "--device", "cpu", "--dry-run", "--no-compile",
             "--out", tmp_path / "o"]
    with open(tmp_path / "log", "w+") as log:
        assert sorted(in_turns(names, map(str, flags), log)) == [0, 0, 2]
        log.seek(0)
        turns = [line.split()[0] for line in log if line.endswith(" goes on\n")]
    assert turns == [name[:-2] for name in names[:2] * 3 + names[:1]]  # the first two measure the matmul
    lines = [json.loads(line) for line in (tmp_path / "o").read_text().splitlines()]
    assert [(line["script"], line["n"]) for line in lines] == [("main16_silu.py", 2), ("main9_muon.py", 3)]

def test_what_ends_a_part_ends_the_turns(tmp_path):
    """A killed script is no success, and an error of the system is the line that the script has for it."""
    (tmp_path / "killed.py").write_text("import os; os.kill(os.getpid(), 9)")
    main9 = [HERE / "main9_muon.py", "--data=synthetic", "--device=cpu", "--dry-run", "--out=/proc/none/o"]
    for command, code, lines in ([tmp_path / "killed.py"], 137, 0), (main9, 2, 1):
        run = subprocess.run([sys.executable, __file__, *command], capture_output=True, text=True)
        assert run.returncode == code and run.stderr.count("\n") == lines, run

if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        take_part(*sys.argv[2:])
        sys.exit()
    first = next((i for i, word in enumerate(sys.argv) if i and word[0] == "-"), len(sys.argv))
    first > 1 or leave("name scripts to run, as airbench/main8_compile.py:40")
    try:
        sys.exit(max(in_turns(sys.argv[1:first], sys.argv[first:])))
    except KeyboardInterrupt:  # of which each script says what it keeps
        sys.exit(130)
