"""Checks of all ladders, and the tables of their READMEs.

    python test_smoke.py                               every check, those in the ladders' folders too, by file
    python test_smoke.py tables                        rewrite README tables and Result lines from results/
    python test_smoke.py short SCRIPT EPOCHS [FLAG..]  SCRIPT of fewer epochs, to results/short.jsonl or --out
    python test_smoke.py kernels LADDER                check and time its kernels on this GPU

A ladder is a folder in LADDERS with mainN_name.py files; whatever else it holds is compared with its main0.
The checks of its ideas, the TABLES of its README, FILES made from results: all in its test_LADDER.py.
"""
import ast, bisect, concurrent.futures, functools, hashlib, importlib.util, itertools, json, os, pathlib
import pickle, re, resource, shutil, signal, statistics, subprocess, sys, tarfile, tempfile, time

import pytest

if sys.argv[1:2] not in (["short"], ["kernels"]):  # for the checks; read when torch and triton are imported
    os.environ.update(OMP_NUM_THREADS="1", TRITON_INTERPRET="1")

ROOT = pathlib.Path(__file__).resolve().parent
LADDERS = ["airbench", "vitfreeze", "hypernet", "hnet_cl"]
DATA_SETS = "cifar10", "cifar10+cifar100"  # whole ones, whose results are published
KEYS = ["Adds", "Changes", "Result", "Vs previous", "Source", "Run"]
BUDGETS = {  # changed lines; 60 elsewhere: kernels, optimizers, hypernetworks, loops to replay
    "airbench/main5_lookahead.py": 90, "airbench/main6_tta.py": 90, "airbench/main9_muon.py": 100,
    "airbench/main10_graph.py": 140, "airbench/main14_augment.py": 70, "airbench/main15_fuse.py": 100,
    "airbench/main26_first.py": 145, "airbench/main28_norms.py": 85, "vitfreeze/main1_hog.py": 150,
    "vitfreeze/main2_tokens.py": 150, "vitfreeze/main3_norms.py": 150, "vitfreeze/main4_compile.py": 140,
    "vitfreeze/main5_freezeout.py": 260, "vitfreeze/main10_cache.py": 155, "vitfreeze/main11_latent.py": 150,
    "vitfreeze/main12_autofreeze.py": 100, "vitfreeze/main15_layerdrop.py": 100,
    "hypernet/main7_compile.py": 270, "hypernet/main8_autodecode.py": 150, "hnet_cl/main2_chunked.py": 80,
    "hnet_cl/main4_batched.py": 90, "hnet_cl/main6_structured.py": 110, "hnet_cl/main8_bbb.py": 190,
    "hnet_cl/main9_samples.py": 70, "hnet_cl/main10_ssge.py": 175, "hnet_cl/main12_gram.py": 80,
    "hnet_cl/main13_graph.py": 105, "hnet_cl/main14_seeds.py": 175}
LINES = {  # of a script, 500 elsewhere
    "airbench": 600,  # from main9 on: an optimizer, a CUDA graph, and then one Triton kernel after the other
    **{f"airbench/{p.name}": 995 + 45 * (p.name > "main45") for p in ROOT.glob("airbench/main[2-9]?_*.py")},
    **{f"airbench/main{i}.py": 720 for i in "15_fuse 16_silu 17_tune 18_tail 19_jitter 20_even".split()},
    **{f"airbench/main{i}.py": 760 for i in "21_update 22_stem 23_blocks 24_rest 25_search".split()},
    "vitfreeze": 1470, "hnet_cl": 1310, "hypernet": 780}  # checkpoints, folders, splits, four networks, pairs
AFTER = {"main21_update.py": "main18_tail.py",  # the step that one goes on from, where that is not the last
         **{f"main{name}.py": "main38_sizes.py" for name in ("40_freeze", "41_recalibrate", "42_margin")}}
SHARED = ["fail", "argument_parser", "print_columns", "print_training_details", "environment", "t_sf",
          "statistics", "append_line", "finish"]  # the same in every script that has it

# ---------------------------------------------------------------------- scripts as text
def scripts(ladder):
    """[(predecessor or None, script)]: mainN after mainN-1 or AFTER, X_y after X, others after main0."""
    folder = ROOT / ladder
    mains = sorted(folder.glob("main*.py"), key=lambda path: int(re.match(r"main(\d+)_", path.name)[1]))
    others = sorted(path for path in folder.glob("*.py") if path not in mains and path.name[:5] != "test_")
    before = {path: folder / f"{path.stem.rpartition('_')[0]}.py" for path in others}
    after = [(folder / AFTER.get(path.name, old.name), path) for old, path in zip(mains, mains[1:])]
    return [(None, mains[0]), *after] + [
        (old if old in others else mains[0], path) for path, old in before.items()]

ALL = [pair for ladder in LADDERS for pair in scripts(ladder)]

def docstring(path):
    """The header as a dict of KEYS, and its first line under 'title'."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    title, body = text.split("\n\n", 1)
    parts = re.split(r"^([A-Z][a-z ]+): ", body.split("\n\n")[0], flags=re.M)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2])), title=title, order=parts[1::2])

@functools.cache
def blocks(path):
    """{name: text} of the top-level statements in order, without the docstring, comments above included."""
    text = path.read_text()
    lines, found, end = text.splitlines(), {}, 0
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = node.name
        elif isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
        else:
            name = " ".join(ast.unparse(node).split("\n")[:2])
        assert name not in found, f"{path.name} defines {name} twice"
        found[name] = "\n".join(line for line in lines[end:node.end_lineno] if line)
        end = node.end_lineno
    return dict(list(found.items())[1:])

@functools.cache
def hyp(path):
    """The HYP of a script as JSON holds it."""
    return json.loads(json.dumps(eval(blocks(path)["HYP"].split("HYP =")[1], {"dict": dict})))

@functools.cache
def changed_lines(before, after):
    """(added, removed) lines between two scripts as git counts them, docstrings left out."""
    with tempfile.TemporaryDirectory() as folder:
        for name, path in (("a", before), ("b", after)):
            pathlib.Path(folder, name).write_text(path.read_text().split('"""', 2)[2])
        command = ["git", "diff", "--no-index", "--numstat", "a", "b"]
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    return tuple(int(count) for count in answer.split()[:2])

@functools.cache
def load(path):
    """A script as a module; it is not run."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_headers_have_all_keys():
    for _, path in ALL:
        head = docstring(path)
        assert head["title"].startswith(f"{path.name} -- "), path
        assert head["order"] == KEYS, f"{path}: {head['order']}"
        assert f"python {path.parent.name}/{path.name}" in head["Run"], path

def test_copies_differ_only_where_the_header_says():
    for before, after in ALL:
        if before is None:
            continue
        old, new = blocks(before), blocks(after)
        differing = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
        differing = {name for name in differing if not name.startswith(("import ", "from "))}
        named = set(docstring(after)["Changes"].split())
        if named == {"everything"} and not after.name.startswith("main"):
            continue  # a script of another purpose
        assert differing == named, f"{after.name}: header and text differ in {sorted(differing ^ named)}"
        common = [name for name in old if name in new]
        assert common == [name for name in new if name in old], f"{after.name} moves a block"

def test_shared_functions_are_the_same_everywhere():
    for name in SHARED:
        texts = {blocks(path)[name] for _, path in ALL if name in blocks(path)}
        assert len(texts) == 1, f"{name} has {len(texts)} forms"

def test_steps_are_small():
    for before, after in ALL:
        if before and after.name.startswith("main"):
            added, removed = changed_lines(before, after)
            assert added + removed <= BUDGETS.get(f"{after.parent.name}/{after.name}", 60), after.name

def test_files_fit_on_a_page():
    for path in [path for _, path in ALL] + [ROOT / "test_smoke.py", *ROOT.glob("*/test_*.py")]:
        lines = path.read_text().splitlines()
        limit = LINES.get(f"{path.parent.name}/{path.name}", LINES.get(path.parent.name, 500))
        assert len(lines) <= limit, f"{path.name} has {len(lines)} lines"
        wide = [number for number, line in enumerate(lines, 1) if len(line) > 110]
        assert not wide, f"{path.name} has lines over 110 columns: {wide}"

def test_imports_are_pinned_and_nothing_local():
    pinned = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.M))
    assert sorted(pinned) == ["numpy", "torch", "torchvision", "triton"]
    for _, path in ALL:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                package = name.split(".")[0]
                assert package in pinned or package in sys.stdlib_module_names, f"{path.name} imports {name}"

# ---------------------------------------------------------------------- tables
@functools.cache
def read_results(ladder):
    """Lines of results/*.jsonl, each with its file's name."""
    paths = sorted((ROOT / ladder / "results").glob("*.jsonl"))
    return [dict(json.loads(line), file=path.name)
            for path in paths for line in path.read_text().splitlines()]

def usable(line, path):
    """Whether a line is a published result of that script: real data, not shortened, compiled as meant."""
    return (line["script"] == path.name and line.get("data") in DATA_SETS and not line["dry_run"]
            and line["hyp"] == hyp(path) and "--no-compile" not in line["argv"])

def machine(line):
    """What must be the same for two times to compare."""
    if line["device"] == "cuda":
        return f"{line['gpu']} at {line['power_limit_w']} W, torch {line['torch']}"
    dtype = line.get("dtype", "float32").replace("bfloat16 autocast", "bf16")
    return f"{line['cpu'].replace('(R)', '')}, {line['cpu_threads']} threads, {dtype}, torch {line['torch']}"

def pool(lines, path, device, name=None):
    """All usable runs of a script on 'cuda' or 'cpu', of one machine or the one used last, as a dict or None.
    Those of its present text count, or else, marked, those of the text measured last; none is left out."""
    lines = [line for line in lines if line["device"] == device and usable(line, path)]
    lines = [line for line in lines if machine(line) == (name or machine(lines[-1]))]
    if not lines:
        return None
    body = hashlib.sha256(path.read_text().split('"""', 2)[2].encode()).hexdigest()
    text = body if any(line["sha256"] == body for line in lines) else lines[-1]["sha256"]
    lines = [line for line in lines if line["sha256"] == text]
    accs, times = ([run[key] for line in lines for run in line["runs"]] for key in ("acc", "time_seconds"))
    return dict(lines[-1], lines=lines, times=times, n=len(times), accs=accs, seconds=statistics.fmean(times),
                peak_mib=max(line["peak_mib"] for line in lines),
                peak_tflops=statistics.fmean(line["peak_tflops"] for line in lines for _ in line["runs"]),
                mark="" if text == body else " (†)")

def mean_std(values, digits, scale=1.0):
    values = [value * scale for value in values]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"

def welch(new, old, scale=1.0):
    """95 % interval of the difference of the mean times of two pools, as text, by those of their lines that
    ended nearest to each other, as do those of one go; fewer than 10 runs of either say nothing."""
    ended = lambda line: time.mktime(time.strptime(line["utc"], "%Y-%m-%dT%H:%M:%SZ"))
    apart = lambda pair: abs(ended(pair[0]) - ended(pair[1]))
    pair = min(itertools.product(new["lines"], old["lines"]), key=apart)
    a, b = ([run["time_seconds"] * scale for run in line["runs"]] for line in pair)
    if min(len(a), len(b)) < 10:
        return "not measured"
    error_a, error_b = (statistics.variance(values) / len(values) for values in (a, b))
    df = (error_a + error_b) ** 2 / (error_a ** 2 / (len(a) - 1) + error_b ** 2 / (len(b) - 1))
    below = lambda t: load(ALL[0][1]).t_sf(t / 1000, df) <= 0.025
    quantile = (1900 + bisect.bisect_left(range(1900, 13000), True, key=below)) / 1000
    delta, half = statistics.fmean(a) - statistics.fmean(b), quantile * (error_a + error_b) ** 0.5
    return f"{delta:+.3f} [{delta - half:+.3f}, {delta + half:+.3f}]"

def markdown(rows):
    return "\n".join(["| " + " | ".join(row) + " |" for row in [rows[0], ["-"] * len(rows[0])] + rows[1:]])

def tables(ladder):
    """{marker in the folder's README: function that gives the table} of a ladder, from its test_LADDER.py"""
    return load(ROOT / ladder / f"test_{ladder}.py").TABLES

def with_tables(ladder):
    """The text of the folder's README with its tables made anew."""
    path = f"{ladder}/README.md"
    text = (ROOT / path).read_text()
    for marker, table in tables(ladder).items():
        pattern = rf"(<!-- {marker} -->\n).*?(<!-- end -->)"
        assert len(re.findall(pattern, text, re.S)) == 1, f"{path} needs one '{marker}' place"
        text = re.sub(pattern, lambda match: f"{match[1]}{table()}\n{match[2]}", text, flags=re.S)
    return text

def with_result(before, path):
    """The text of a script with its Result and Vs previous lines made anew; a GPU comes before a CPU."""
    lines, text = read_results(path.parent.name), path.read_text()
    gpu, line, delta = pool(lines, path, "cuda"), "not measured", "not measured"
    if found := gpu or pool(lines, path, "cpu"):
        seconds = mean_std(found["times"], 3) + " s" if gpu else mean_std(found["times"], 1, 1 / 60) + " min"
        accuracy = f"{mean_std(found['accs'], 2, 100)} % (n={found['n']}){found['mark']}"
        line = f"{accuracy}, {seconds}, {machine(found)}"
    if gpu and before and (other := pool(lines, before, "cuda")):
        delta = welch(gpu, other).replace("]", "] s [95 % interval]")
    text = re.sub(r"^Result: .*$", lambda _: f"Result: {line}", text, count=1, flags=re.M)
    return re.sub(r"^Vs previous: .*$", lambda _: f"Vs previous: {delta}", text, count=1, flags=re.M)

def test_readme_tables_are_what_the_results_say():
    for ladder in LADDERS:
        text = (ROOT / ladder / "README.md").read_text()
        assert with_tables(ladder) == text, f"{ladder}: run python test_smoke.py tables"
    for before, path in ALL:
        assert with_result(before, path) == path.read_text(), f"{path.name}: run python test_smoke.py tables"

def test_readmes_point_at_files():
    for path in [ROOT / "README.md"] + [ROOT / ladder / "README.md" for ladder in LADDERS]:
        text = path.read_text()
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (path.parent / target).exists(), f"{path} links to {target}"
        for target in re.findall(r"(?:python|diff --no-index.*?) (\w+/\w+\.py)", text):
            assert (ROOT / target).exists(), f"{path} names {target}"

def test_results_name_no_machine_path():
    for line in [line for ladder in LADDERS for line in read_results(ladder)]:
        assert not re.search(r'"(--\w+=)?[/~]', json.dumps(line.get("argv", []))), line["file"]

def test_tables_refuse_what_is_no_result():
    path = ROOT / "airbench" / "main0_network.py"
    good = dict(script=path.name, data="cifar10", dry_run=False, hyp=hyp(path), argv=[])
    assert usable(good, path)
    for bad in (dict(data="synthetic"), dict(data="other"), dict(dry_run=True), dict(argv=["--no-compile"]),
                dict(hyp=dict(good["hyp"], epochs=2.0))):
        assert not usable(dict(good, **bad), path), bad

# ---------------------------------------------------------------------- scripts as a user runs them
ENV = dict(os.environ, OMP_NUM_THREADS="1", TORCH_COMPILE_DISABLE="1", TRITON_INTERPRET="",
           CUDA_VISIBLE_DEVICES="", http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
FIRST = scripts("airbench")[0][1]

def call(path, *flags, code=0, **options):
    """Run a script; -> what it printed. A failure is one line on stderr that names the script."""
    command = [sys.executable, path, *map(str, flags)]
    done = subprocess.run(command, env=ENV, text=True, capture_output=True, **options)
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        assert re.fullmatch(rf"{path.name}: error: .+\n", done.stderr), done.stderr
    return done.stdout + done.stderr

def side_by_side(function, *arguments):
    """map, with as many calls at once as there are cores."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(function, *arguments))

def write_cifar(folder, train=64, test=40):
    """A tiny data set in the format of the prepared caches."""
    import torch
    folder.mkdir(exist_ok=True)
    for name, n in (("train", train), ("test", test)):
        data = load(FIRST).draw_synthetic(n, seed=n)
        torch.save(dict(data, classes=[str(c) for c in range(10)]), folder / f"{name}.pt")
    return folder

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A tiny data set, and what a ladder's write_data puts beside it."""
    folder = write_cifar(tmp_path_factory.mktemp("data"))
    for ladder in LADDERS:
        getattr(load(ROOT / ladder / f"test_{ladder}.py"), "write_data", lambda folder: None)(folder)
    return folder

DRY_RUNS = """
import os, runpy, sys
import numpy, torchvision, triton, torch._inductor.compile_fx  # once, which takes longer than a run: a fork
data, out, twice, *paths = sys.argv[1:]
for path in paths:
    name = out + "/" + "-".join(path.split(os.sep)[-2:])
    if child := os.fork():
        os.waitpid(child, 0)[1] and sys.exit(f"{path} failed")
        continue
    os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT), 1)
    for more in (["--runs=2"], ["--seed=1", "--no-compile"])[:1 + (path in twice.split(os.pathsep))]:
        sys.argv = [path, "--device=cpu", "--dry-run", "--data", data, "--out", f"{name}.jsonl", *more]
        runpy.run_path(path, run_name="__main__")
    sys.exit()"""

@pytest.fixture(scope="session")
def dry_runs(data, tmp_path_factory):
    """{script: (stdout, line of seeds 0 and 1[, line of seed 1])} of every script of every ladder. Those run
    again, without the warm-up of what compiles, whose loop no later step copies."""
    out, paths, cores = tmp_path_factory.mktemp("out"), [path for _, path in ALL], os.cpu_count()
    before = {before for before, path in ALL if path.name.startswith("main")}
    twice = os.pathsep.join(str(path) for path in paths if path not in before)
    def share(first):
        command = [sys.executable, "-c", DRY_RUNS, data, out, twice, *paths[first::cores]]
        done = subprocess.run(command, env=ENV, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    side_by_side(share, range(cores))
    names = {path: out / f"{path.parent.name}-{path.name}" for path in paths}
    return {path: (pathlib.Path(f"{name}.txt").read_text(), *map(
        json.loads, pathlib.Path(f"{name}.jsonl").read_text().splitlines())) for path, name in names.items()}

@pytest.mark.parametrize("path", [path for _, path in ALL], ids=lambda path: path.stem)
def test_script_runs_and_reports(path, dry_runs):
    text, two, *again = dry_runs[path]
    wanted = """script sha256 git argv hyp n acc_mean acc_std acc_ci95 target p_value time_mean time_std
        load_seconds compile_seconds diag_seconds wall_seconds peak_mib gpu power_limit_w driver cuda cudnn
        torch triton numpy python utc mfu pflops pflops_nominal data data_sha256 compiled runs device dry_run
        cpu""".split()
    assert set(wanted) <= two.keys() and two["dry_run"] and two["data"] == "other"
    assert two["n"] == len(two["runs"]) == 2
    assert f"-- {path.stem} on other data --" in text and f"acc_mean: {two['acc_mean']}\n" in text
    rows = [[x for row in run["epochs"] for x in row.values() if isinstance(x, float)]
            for line in (two, *again) for run in line["runs"]]
    near = 0.02 * (path.stem == "main14_seeds")  # seeds side by side round otherwise than each alone
    assert rows[0] != pytest.approx(rows[1], near, near), "another seed gives the same run"
    assert rows[2:] == [pytest.approx(rows[1], near, near)] * len(again), "the same seed gives another run"
    assert two["sha256"] == hashlib.sha256(path.read_text().split('"""', 2)[2].encode()).hexdigest()

@pytest.mark.parametrize("path", [path for _, path in ALL], ids=lambda path: path.stem)
def test_help_is_instant(path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--dry-run" in call(path, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    call(path, "--no-such-flag", code=2)

def test_wrong_use(data, tmp_path):
    cases = [(["--runs", "0"], 2), (["--out", "/proc/none/a.jsonl"], 2), (["--data", data], 3),
             (["--data=synthetic", "--target=0.9"], 1), (["--data", data, "--dry-run", "--target=1"], 1)]
    cases += [(["--device", "cuda"], 4)] * (not load(FIRST).torch.cuda.is_available())
    def check(flags, code):
        return call(FIRST, "--out", tmp_path / str(code), *flags, code=code)
    texts = side_by_side(check, *zip(*cases))
    assert "batch of 1024" in texts[2] and "below 1.0" in texts[4]

def test_damaged_data(tmp_path, capsys):
    archive, whole = "cifar-10-python.tar.gz", write_cifar(tmp_path / "whole")
    good = (whole / "train.pt").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    md5 = "cifar-10-python.tar.gz (md5 c58f30108f718f92721af3b95e74349a)"
    cases = [({}, md5), ({archive: b"\x1f\x8b" + bytes(1000)}, archive), ({"cifar-10-batches-py": None}, md5),
             ({"train.pt": good}, "test.pt is missing")]
    cases += [({"train.pt": bad, "test.pt": (whole / "test.pt").read_bytes()}, "train.pt is missing, damaged")
              for bad in (good[:len(good) // 2], bytes(flipped), b"", b"no archive at all")]
    for number, (files, sentence) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
        with pytest.raises(SystemExit) as end:
            load(FIRST).load_data(folder)
        text = capsys.readouterr().err
        assert end.value.code == 3 and re.fullmatch(rf"{FIRST.name}: error: .+\n", text) and sentence in text
    call(FIRST, "--data", folder, "--dry-run", "--out", tmp_path / "o", code=3)

def test_official_archive_is_checked_prepared_and_kept(tmp_path, monkeypatch):
    """A small archive in the official format, whose md5 sums take the place of the official ones."""
    module = load(FIRST)
    md5 = lambda path: hashlib.md5(path.read_bytes()).hexdigest()
    folder, drawn = tmp_path / module.CIFAR10.base_folder, module.draw_synthetic(30, seed=3)
    folder.mkdir()
    pixels = drawn["images"].permute(0, 3, 1, 2).reshape(30, -1).numpy()
    content = {"train": dict(data=pixels[:20], labels=drawn["labels"][:20].tolist()), "batches.meta": dict(
        label_names=list("abcdefghij")), "test": dict(data=pixels[20:], labels=drawn["labels"][20:].tolist())}
    for name, part in content.items():
        (folder / name).write_bytes(pickle.dumps(part))
    archive = tmp_path / module.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    sums = dict(tgz_md5=md5(archive), train_list=[["train", md5(folder / "train")]],
                test_list=[["test", md5(folder / "test")]])
    for name, value in dict(sums, meta=dict(module.CIFAR10.meta, md5=md5(folder / "batches.meta"))).items():
        monkeypatch.setattr(module.CIFAR10, name, value)
    shutil.rmtree(folder)
    for _ in range(2):  # from the archive, then from the caches alone
        name, train, test = module.load_data(tmp_path)
        assert name == "other" and (train["images"] == drawn["images"][:20]).all()
        assert (test["images"] == drawn["images"][20:]).all()
        assert (test["labels"] == drawn["labels"][20:]).all()
        archive.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

def test_without_data_or_network_the_built_in_set_is_used(tmp_path):
    text = call(FIRST, "--dry-run", "--out", tmp_path / "o", cwd=tmp_path)
    line = json.loads((tmp_path / "o").read_text())
    assert text.count("NOTICE: ") == 3 and "on synthetic data" in text and line["data"] == "synthetic"

def test_killed_series_goes_on(data, tmp_path):
    out = tmp_path / "o.jsonl"
    flags = ["--device", "cpu", "--dry-run", "--data", data, "--out", out]
    series = subprocess.Popen([sys.executable, FIRST, *map(str, flags), "--runs", "100000"], env=ENV,
                              stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (partial := list(tmp_path.glob("*.partial"))) and time.time() < deadline:
        time.sleep(0.05)
    series.send_signal(signal.SIGKILL)
    series.wait()
    done = [json.loads(line) for line in partial[0].read_text().splitlines()]
    text = call(FIRST, *flags, "--runs", len(done) + 1)
    line = json.loads(out.read_text())
    assert f"continuing after {len(done)} of {len(done) + 1} runs" in text and line["runs"][:-1] == done
    assert [run["seed"] for run in line["runs"]] == list(range(len(done) + 1))
    assert not list(tmp_path.glob("*.partial"))

def test_full_disk_loses_no_line(data, tmp_path):
    out = tmp_path / "o.jsonl"
    out.write_text(old := json.dumps(dict(old="x" * 5000)) + "\n")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    text = call(FIRST, "--dry-run", "--data", data, "--out", out, code=1, preexec_fn=limit)
    assert out.read_text() == old and '"acc_mean":' in text

def test_out_of_memory_says_so(tmp_path):
    probe = "import torchvision; print(open('/proc/self/status').read().split('VmPeak:')[1].split()[0])"
    kib = int(subprocess.run([sys.executable, "-c", probe], env=ENV, capture_output=True, text=True).stdout)
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (kib * 1024 + (700 << 20),) * 2)
    flags = ["--data", "synthetic", "--device", "cpu", "--out", tmp_path / "o"]
    text = call(FIRST, *flags, code=1, preexec_fn=limit)
    assert re.search(r"out of memory at batch size 1024, with \d+ of \d+ MiB free", text)

def test_loss_that_is_not_finite_ends_the_run(data, tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(FIRST.parent)!r}); import {FIRST.stem} as m; "
            "m.HYP.update(lr=1e30); m.main(m.argument_parser().parse_args())")
    flags = ["--dry-run", "--data", data, "--out", tmp_path / "o"]
    done = subprocess.run([sys.executable, "-c", code, *flags], env=ENV, text=True, capture_output=True)
    assert done.returncode == 1
    assert re.fullmatch(r".*: error: the loss is (nan|inf) in run 0.*\n", done.stderr)

# ---------------------------------------------------------------------- commands

def check(path):
    """Exit code of the checks of a file in a process of its own, whose output is printed at its end."""
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", path]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(f"-- {path.relative_to(ROOT)}\n{done.stdout}", flush=True)
    return done.returncode

def main(command=None, *rest):
    if command is None:  # the longest first
        paths = [ROOT / "test_smoke.py", *ROOT.glob("*/test_*.py")]
        paths.sort(key=lambda path: (path.parent != ROOT, -path.stat().st_size))
        sys.exit(any(side_by_side(check, paths)))
    if command == "tables":
        for ladder in LADDERS:
            (ROOT / ladder / "README.md").write_text(with_tables(ladder))
            print(*(f"{marker}\n{table()}\n" for marker, table in tables(ladder).items()), sep="\n")
            for name, content in getattr(load(ROOT / ladder / f"test_{ladder}.py"), "FILES", {}).items():
                (ROOT / ladder / name).write_text(content())
        for before, path in ALL:
            path.write_text(with_result(before, path))
    elif command == "short":
        module = load(ROOT / rest[0])
        args = module.argument_parser().parse_args(rest[2:])
        args.out = args.out or (ROOT / rest[0]).parent / "results" / "short.jsonl"
        module.HYP["epochs"] = float(rest[1])
        module.main(args)
    elif command == "kernels":
        module, base = load(ROOT / rest[0] / f"test_{rest[0]}.py"), load(ALL[0][1])
        base.torch.cuda.is_available() or base.fail(4, "no usable CUDA GPU")
        module.kernels()
    else:
        sys.exit(pytest.main([str(ROOT), command, *rest]))

if __name__ == "__main__":
    main(*sys.argv[1:])
