"""Publishing: what arrives, who may, what is refused, what an interruption leaves."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from fake_hub_storage import Blob
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_messages, tiny_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

import qvlm_hf
from qvlm_hf import QVLMConfig, publish, publish_folder, save_quantized
from qvlm_hf.calibration.samples import Sample, collate
from qvlm_hf.cli import main
from qvlm_hf.demo import model_dir
from qvlm_hf.hf.publishing import publish_command
from qvlm_hf.hub.errors import explained
from qvlm_hf.hub.payload import check_secrets, choose_files
from qvlm_hf.hub.upload import Target, check_target, fetch_card, upload, verify

pytestmark = pytest.mark.hub

TOKEN = "hf_" + "x" * 34
REPO = "me/tiny"
ROUND = ["--scheme", "W4A16", "--method", "rtn"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model in full precision, and its processor."""
    path = save_tiny(tmp_path_factory.mktemp("source") / "tiny-llava")
    tiny_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model(source):
    return loaded(source, quantization_config=QVLMConfig(scheme="W4A16"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, source, model, processor):
    """`model` in one file and in shards, and one that answers differently, likewise."""
    root = tmp_path_factory.mktemp("saved")
    other = loaded(source, quantization_config=QVLMConfig(scheme="W2A16"))
    made = {}
    for name, it in (("", model), ("other-", other)):
        for kind, size in (("single", "50GB"), ("sharded", "60KB")):
            path, report = root / f"{name}{kind}", it.hf_quantizer.report
            save_quantized(it, processor, path, report=report, max_shard_size=size)
            made[path.name] = path
    return made


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model that a test may change."""
    return Path(shutil.copytree(saved["single"], tmp_path / "tiny-w4a16"))


@pytest.fixture
def sharded(saved, tmp_path):
    return Path(shutil.copytree(saved["sharded"], tmp_path / "tiny-sharded"))


def loaded(repo_id, **options):
    return AutoModelForImageTextToText.from_pretrained(repo_id, **options)


def inputs(processor, dtype=torch.float32):
    messages = [tuple(record["messages"][:1]) for record in tiny_messages(2, seed=7)]
    samples = [Sample(messages=asked, origin="test") for asked in messages]
    found = collate(samples, processor).inputs
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in found.items()}


def answers(model, processor):
    with torch.no_grad():
        return model(**inputs(processor, model.dtype)).logits


def push_config(**fields):
    return QVLMConfig(scheme="W4A16", push_to_hub=True, hub_model_id=REPO, **fields)


def content(hub, repo_id=REPO, revision="main"):
    return hub.repo(repo_id).files(revision)


def local(folder, names):
    return {name: (folder / name).read_bytes() for name in names}


# ---- what arrives --------------------------------------------------------------------------------


def test_another_process_loads_what_was_published(hub, api, source, processor, tmp_path):
    demo = loaded(model_dir(), quantization_config=QVLMConfig(scheme="W4A16"))
    demo_processor = AutoProcessor.from_pretrained(model_dir())
    published = publish(demo, demo_processor, "me/demo-w4a16", api=api)
    assert published.files == tuple(sorted(content(hub, "me/demo-w4a16")))
    assert published.revision == hub.repo("me/demo-w4a16").commit().oid
    assert published.commit_url == f"{hub.endpoint}/me/demo-w4a16/commit/{published.revision}"
    assert (published.pull_request_url, published.folder) == (None, None)
    config = QVLMConfig(recipe="fixed",
        scheme="W4A4", dataset=tiny_messages(4), processor=processor, num_samples=4,
        percentiles=(1.0, 0.999), margins=(), max_block_depth=2,
    )  # fmt: skip
    searched = loaded(source, quantization_config=config)
    publish(searched, processor, "tiny-w4a4", private=True, api=api)  # a bare name is the user's
    made = {"me/demo-w4a16": (demo, demo_processor), "me/tiny-w4a4": (searched, processor)}
    fed = {name: inputs(processor, model.dtype) for name, (model, processor) in made.items()}
    torch.save(fed, tmp_path / "inputs.pt")
    for name in made:
        api.snapshot_download(name)  # all that the other process has
    script = Path(__file__).parent / "fresh_load.py"
    words = [sys.executable, script, tmp_path / "inputs.pt", tmp_path / "out.pt", *made]
    subprocess.run(words, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True, timeout=300)
    found = torch.load(tmp_path / "out.pt")
    for name, pair in made.items():
        assert torch.equal(found[name], answers(*pair)), name
    assert not [path for path in (tmp_path / "assets").rglob("*") if path.is_file()]


def test_one_commit_holds_what_belongs_and_a_second_one_sends_nothing(hub, api, transfer, folder):
    foreign = ("secret.env", "notes.txt", ".env", "pytorch_model.bin", "adapter_model.safetensors")
    for name in foreign:
        (folder / name).write_text(f"TOKEN={TOKEN}")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "config.json").write_text("{}")
    first = publish_folder(folder, REPO, api=api)
    assert set(first.left_out) == {*foreign, "checkpoint-1"}
    assert content(hub) == local(folder, first.files)
    wanted = "README.md config.json model.safetensors processor_config.json qvlm_report.json"
    assert {*wanted.split(), "tokenizer.json"} <= set(first.files)
    titles = [commit.title for commit in hub.repo(REPO).history()]
    assert titles == ["Upload a model that qvlm_hf quantized to W4A16", "initial commit"]
    sent = len(hub.calls("PUT", "/upload/"))
    assert publish_folder(folder, REPO, api=api).revision == first.revision
    assert len(hub.calls("PUT", "/upload/")) == sent
    assert len(hub.repo(REPO).history()) == 2


@pytest.mark.parametrize("before", ["other-sharded", "other-single"])
@pytest.mark.parametrize("after", ["sharded", "single"])
def test_stale_weights_are_never_loaded(hub, api, saved, processor, tmp_path, before, after):
    old, new = (Path(shutil.copytree(saved[kind], tmp_path / kind)) for kind in (before, after))
    publish_folder(old, REPO, api=api)
    for name in ("adapter_config.json", "notes.txt"):
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=REPO)
    published = publish_folder(new, REPO, api=api)
    assert content(hub) == {**local(new, published.files), "notes.txt": b"{}"}
    there, mine, other = (answers(loaded(path), processor) for path in (REPO, new, old))
    assert torch.equal(there, mine)
    assert not torch.equal(there, other)


def test_private_branches_and_pull_requests(hub, api, transfer, folder):
    published = publish_folder(folder, REPO, private=True, revision="w4a16", api=api)
    assert (hub.repo(REPO).private, content(hub)) == (True, {})
    assert content(hub, revision="w4a16") == local(folder, published.files)
    assert publish_folder(folder, REPO, revision="w4a16", api=api).revision == published.revision
    assert hub.repo(REPO).private  # None leaves it as it is
    for found, there, asked in ((True, "private", False), (False, "public", True)):
        hub.repo(REPO).private = found
        message = f"^me/tiny: is {there} on the Hub already, and private={asked} "
        with pytest.raises(ValueError, match=message):
            publish_folder(folder, REPO, private=asked, api=api)
    stranger = HfApi(token=hub.add_user("stranger"))
    hub.requests.clear()
    published = publish_folder(folder, REPO, create_pr=True, api=stranger)
    assert not hub.calls("POST", "/repos/create")
    assert published.pull_request_url == f"{hub.endpoint}/me/tiny/discussions/1"
    again = publish_folder(folder, REPO, revision="refs/pr/1", license="mit", api=stranger)
    assert content(hub, revision="refs/pr/1") == local(folder, again.files)
    assert (content(hub), len(hub.repo(REPO).pull_requests)) == ({}, 1)


@pytest.mark.parametrize(
    ("card", "license"),
    [
        (b"---\nlicense: apache-2.0\nlanguage: [en]\n---\n# base", "apache-2.0"),
        (None, None),
        (b"---\n: [\n---\n", None),
    ],
)
def test_the_card_takes_the_licence_of_the_base_model(hub, api, folder, card, license):
    api.create_repo("me/base")
    if card is not None:  # not through the client, which would refuse the broken one
        hub.repo("me/base").advance({"README.md": Blob(card)}, "card")
    publish_folder(folder, REPO, base_model="me/base", api=api)
    text = content(hub)["README.md"].decode()
    found = api.model_info(REPO).card_data
    assert (found.license, found.base_model, found["quantized_by"]) == (license, "me/base", "me")
    assert "base_model:quantized:me/base" in api.model_info(REPO).tags
    assert 'from_pretrained("me/tiny")' in text
    assert fetch_card(api, None) is fetch_card(api, "me/nowhere") is None


# ---- in Python -----------------------------------------------------------------------------------


def test_a_model_from_the_hub_is_quantized_and_pushed_when_it_ends(hub, api, source, processor):
    api.create_repo("me/tiny-llava")
    api.upload_folder(repo_id="me/tiny-llava", folder_path=source)
    card = b"---\nlicense: mit\n---\n# tiny"
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/tiny-llava")
    config = push_config(processor=processor, hub_private=True)
    model = loaded("me/tiny-llava", quantization_config=config)
    assert model.hf_quantizer.published.repo_id == REPO
    assert hub.repo(REPO).private
    assert torch.equal(answers(loaded(REPO), processor), answers(model, processor))
    data = api.model_info(REPO).card_data
    assert (data.base_model, data.license) == ("me/tiny-llava", "mit")
    quantization = json.loads(content(hub)["config.json"])["quantization_config"]
    assert not {"push_to_hub", "hub_model_id", "hub_private"} & set(quantization)
    again = loaded(REPO)  # its report comes from where it was loaded
    files = publish(again, processor, "me/copy", api=api).files
    assert files == model.hf_quantizer.published.files
    assert content(hub, "me/copy")["qvlm_report.json"] == content(hub)["qvlm_report.json"]
    # as of another branch, whose report lies on main
    again.hf_quantizer.quantization_config.provenance = {"seed": 1}
    assert "qvlm_report.json" not in publish(again, processor, "me/copy", api=api).files
    assert "qvlm_report.json" not in content(hub, "me/copy")


@pytest.mark.parametrize(
    ("fields", "role", "kind", "message"),
    [
        ({"dataset": "nowhere.jsonl"}, "read", PermissionError, "me/tiny: the token may only read"),
        ({"processor": None}, "write", ValueError, r"push_to_hub=True publishes the processor too"),
        ({"processor": "tokenizer"}, "write", ValueError, ".*is no chat processor .*"),
    ],
)
def test_a_push_is_checked_before_anything_is_read(
    hub, source, processor, monkeypatch, fields, role, kind, message
):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("me", role=role))
    fields = {"processor": processor} | fields
    if fields["processor"] == "tokenizer":
        fields["processor"] = processor.tokenizer
    with pytest.raises(kind, match=f"^{message}"):
        loaded(source, quantization_config=push_config(**fields))
    assert not hub.repos


class Unplugged:
    """The Hub knows nobody any more when calibration ends."""

    def on_calibration_end(self, model, report):
        self.hub.fail(".*", "", 401, times=None)


@pytest.mark.parametrize("way", ["publish", "push", "push at the end", "shell"])
def test_what_fails_after_saving_is_finished_by_the_command_that_is_told(
    hub, api, source, model, processor, no_waiting, capsys, tmp_path, way
):
    Unplugged.hub = hub
    if way != "push at the end":
        hub.fail("POST", "/commit/", 500, times=None)
    if way == "publish":
        with pytest.raises(ConnectionError, match=r"refuses .500: ") as failed:
            publish(model, processor, REPO, private=True, api=api)
        (said,) = failed.value.__notes__
    elif way == "shell":
        output = str(tmp_path / "out")
        words = ["quantize", str(source), *ROUND, "--output", output, "--push-to-hub", REPO]
        assert main([*words, "--private"]) == 1
        printed, said = capsys.readouterr()
        assert f"saved in {output}\n" in printed
        assert re.match(r"qvlm: error: me/tiny: the Hub refuses .500: .*what has arrived is", said)
    else:
        fields = {"hub_private": True, "callbacks": [Unplugged()] if "end" in way else ()}
        message = f"^push_to_hub: me/tiny: the Hub refuses .{401 if 'end' in way else 500}: "
        with pytest.warns(UserWarning, match=message) as warned:
            model = loaded(source, quantization_config=push_config(processor=processor, **fields))
        assert model.hf_quantizer.published is None
        said = str(warned[-1].message)
    hub.heal()
    assert main(shlex.split(re.search(r"this publishes it: qvlm (.*)", said)[1])) == 0
    assert "published" in capsys.readouterr().out
    assert hub.repo(REPO).private
    assert torch.equal(answers(loaded(REPO), processor), answers(model, processor))


def test_a_callback_that_raises_stops_the_push(hub, source, processor):
    class Unsatisfied:
        def on_calibration_end(self, model, report):
            raise RuntimeError("not good enough")

    config = push_config(processor=processor, callbacks=[Unsatisfied()])
    with pytest.raises(RuntimeError, match="not good enough"):
        loaded(source, quantization_config=config)
    assert not hub.repos


NO_IDS = ["", "a/b/c", "../x", "me/a--b", "/abs/path", "me/x.git", "me/a b", 3]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"license": "apache2"}, "me/tiny: .*license.* must be one"),
        ({"base_model": "/models/base"}, "Repo id must be in the form .*: '/models/base'"),
        ({"create_pr": True, "revision": "dev"}, "create_pr=True opens a pull request against ma"),
        ({"token": TOKEN, "api": HfApi()}, "publish takes token= or api=, not both"),
        ({"token": "\n"}, "token= is empty: leave it out"),
        ({"commit_message": f"with {TOKEN}"}, r"commit_message: holds a Hub token \(hf_\.\.\.\)"),
    ],
)
@pytest.mark.parametrize("function", [publish, publish_folder])
def test_wrong_arguments_fail_before_anything_is_saved(
    hub, model, processor, folder, tmp_path, bad, message, function
):
    before = local(folder, ["README.md"])
    given = (model, processor) if function is publish else (folder,)
    with pytest.raises((ValueError, OSError), match=f"^{message}") as failed:
        function(*given, REPO, **bad)
    assert TOKEN not in str(failed.value)
    assert not getattr(failed.value, "__notes__", [])
    assert not (tmp_path / "assets").exists()
    assert local(folder, ["README.md"]) == before
    assert not hub.repos


@pytest.mark.parametrize("name", NO_IDS)
def test_names_that_the_hub_does_not_have(hub, api, name):
    fields = [{"repo_id": name}, *([{"base_model": name}] if isinstance(name, str) else [])]
    for field in fields:
        with pytest.raises(ValueError, match=r"(?i)^repo.id |^Cannot have") as failed:
            check_target(api, Target(**({"repo_id": REPO} | field)))
        assert "\n" not in str(failed.value)
    assert not hub.requests


def test_what_publish_is_given_must_fit(hub, source, model, processor, tmp_path):
    needs = "^publish needs a quantized model and its processor: quantize it first"
    for given, message in (
        ((loaded(source), processor), needs),
        ((model, None), needs),
        ((model, processor.tokenizer), "is no chat processor .*take the one"),
    ):
        with pytest.raises(ValueError, match=message):
            publish(*given, REPO)
    assert not (tmp_path / "assets").exists()
    assert not hub.requests


def test_a_home_that_cannot_be_written_is_found_at_once(hub, source, model, processor, tmp_path):
    (tmp_path / "assets").write_text("a file, because root may write into every directory")
    config = push_config(dataset="nowhere.jsonl", processor=processor)
    for act in (
        lambda: publish(model, processor, REPO),
        lambda: loaded(source, quantization_config=config),  # and not that there is no nowhere
    ):
        with pytest.raises((OSError, ValueError), match=r"cannot create directory .*assets"):
            act()
    assert not hub.repos


def test_a_token_with_a_line_break(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert publish_folder(folder, REPO, token=f" {hub.token}\n").repo_id == REPO


def test_kernels_and_attention_of_the_model_do_not_disturb_the_self_check(hub, source, processor):
    config = QVLMConfig(scheme="W4A16")
    model = loaded(source, quantization_config=config, attn_implementation="eager")
    qvlm_hf.set_backend(model, "reference")
    assert publish(model, processor, REPO).revision == hub.repo(REPO).commit().oid


def brighter(model):
    """A processor that does what no saved file says."""
    processor = tiny_processor()
    plain = type(processor)

    class Brighter(plain):
        def __call__(self, *args, **options):
            made = super().__call__(*args, **options)
            made["pixel_values"] = made["pixel_values"] * 2
            return made

    Brighter.__name__ = plain.__name__  # what is saved
    processor.__class__ = Brighter
    return processor


def louder(model):
    model.hook = model.lm_head.register_forward_hook(lambda module, args, output: output * 1.001)
    return tiny_processor()


@pytest.mark.parametrize(
    ("change", "what"),
    [(brighter, "processor does not turn a picture"), (louder, "model's logits")],
)
def test_what_loads_differently_is_not_published(hub, source, tmp_path, change, what):
    model = loaded(source, quantization_config=QVLMConfig(scheme="W4A16"))
    with pytest.raises(RuntimeError, match=f"^me/tiny: the saved {what}"):
        publish(model, change(model), REPO)
    assert not hub.repos
    assert not list((tmp_path / "assets").rglob("*.safetensors"))


# ---- interruptions and refusals ------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut upload", "failed commit", "lost answer"])
def test_an_upload_that_fails_changes_nothing_and_its_repeat_is_complete(
    hub, api, transfer, no_waiting, sharded, saved, tmp_path, fault
):
    if fault == "cut upload" and transfer == "xet":
        pytest.skip("no HTTP to cut")
    old = Path(shutil.copytree(saved["other-single"], tmp_path / "old"))
    before = local(old, publish_folder(old, REPO, api=api).files)
    sizes = sorted(file.stat().st_size for file in sharded.glob("*.safetensors"))
    assert len(sizes) > 3
    hub.requests.clear()
    {
        "cut upload": lambda: hub.cut("/upload/", after_bytes=sizes[-2]),
        "failed commit": lambda: hub.fail("POST", "/commit/", 503, times=None),
        "lost answer": lambda: hub.lose_answer("POST", "/commit/"),
    }[fault]()
    with pytest.raises(ConnectionError, match=r"^me/tiny: the Hub .* repeat the command"):
        publish_folder(sharded, REPO, api=api)
    if fault != "lost answer":
        assert content(hub) == before
    hub.heal()
    published = publish_folder(sharded, REPO, api=api)
    assert content(hub) == local(sharded, published.files)
    assert published.revision == hub.repo(REPO).commit().oid
    assert len(hub.repo(REPO).history()) == 3
    arrived = [put for put in hub.calls("PUT", "/upload/") if put.status == 200]
    assert len(arrived) == (len(sizes) if transfer == "lfs" else 0)  # nothing twice


STATUSES = {
    400: (OSError, "see what it says"),
    401: (PermissionError, "run `hf auth login` or set"),
    403: (PermissionError, "take a token with write permission"),
    404: (FileNotFoundError, "check both names"),
    409: (OSError, "see what it says"),
    429: (ConnectionError, "wait some minutes and repeat the command"),
    500: (ConnectionError, "repeat the command; what has arrived is not sent again"),
}


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("path", ["whoami", "/preupload/", "/commit/"])
def test_refusals_are_one_line_that_says_what_to_do(hub, api, no_waiting, saved, status, path):
    kind, remedy = STATUSES[status]
    hub.fail("GET|POST", path, status, times=None)
    payload, target = choose_files(saved["single"], ()), Target(repo_id=REPO)
    told = rf"^me/tiny: the Hub refuses \({status}: .*\): {remedy}"
    asked = (check_target, api, target), (upload, api, saved["single"], target, payload)
    act, *given = asked[path != "whoami"]
    with pytest.raises(kind, match=told) as failed:
        act(*given)
    assert type(failed.value) is kind
    assert "\n" not in str(failed.value)
    assert hub.token not in repr(failed.value)


NOT_FOR_ME = "me/new: the token's user may not make repositories for 'me': name one of str.*, club"
NO_SUCH = "me/new: the Hub refuses .404: .*: check both names"


@pytest.mark.parametrize(
    ("user", "fields", "kind", "message"),
    [
        ("stranger", {}, PermissionError, "me/tiny: the Hub refuses .403: Forbidden"),
        ("reader", {}, PermissionError, "me/tiny: the Hub refuses .403"),
        ("wrong", {}, PermissionError, "me/tiny: the Hub refuses .401: "),
        ("stranger", {"repo_id": "me/new"}, PermissionError, NOT_FOR_ME),
        ("stranger", {"repo_id": "me/new", "create_pr": True}, FileNotFoundError, NO_SUCH),
        ("stranger", {"create_pr": True}, None, ""),
        ("stranger", {"repo_id": "club/new"}, None, ""),
    ],
)
def test_who_may_write_what(hub, api, user, fields, kind, message):
    api.create_repo(REPO)
    token = {
        "stranger": hub.add_user("stranger", orgs=("club",)),
        "reader": hub.add_user("reader", role="read"),
        "wrong": TOKEN,
    }[user]
    asking, target = HfApi(token=token), Target(**({"repo_id": REPO} | fields))
    if kind is None:
        assert check_target(asking, target).user == "stranger"
    else:
        with pytest.raises(kind, match=f"^{message}") as failed:
            check_target(asking, target)
        assert token not in str(failed.value)
    assert set(hub.repos) == {REPO}  # nothing was made


def test_without_token_network_or_permission_to_ask(hub, api, monkeypatch):
    target = Target(repo_id=REPO)
    with pytest.raises(ConnectionError, match=r"^me/tiny: the Hub cannot be reached .*: repeat"):
        check_target(HfApi(endpoint="http://127.0.0.1:9", token=hub.token), target)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=r"^me/tiny: there is no Hub token: run `hf auth log"):
        check_target(HfApi(), target)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"^me/tiny: the Hub cannot be reached \(.*offline"):
        check_target(api, target)


def test_errors_of_the_machine_and_of_hf_xet():
    hf_xet = pytest.importorskip("hf_xet")
    message = r"^me/tiny: the Hub refuses the token .token expired.: run `hf auth login`"
    with pytest.raises(PermissionError, match=message), explained(REPO):
        raise hf_xet.XetAuthenticationError("token expired")
    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] No such file"), explained(REPO):
        Path("no file").read_bytes()


# ---- what is not sent ----------------------------------------------------------------------------


def changed(name, change):
    def damage(folder):
        (folder / name).write_text(change((folder / name).read_text()))

    return damage


def removed(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def token_in_header(folder):
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "note": TOKEN})


def outside(folder):
    (folder / "generation_config.json").rename(folder.parent / "elsewhere.json")
    (folder / "generation_config.json").symlink_to(folder.parent / "elsewhere.json")


def cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:1000])


def nan(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    next(t for name, t in tensors.items() if name.endswith("embed_tokens.weight")).fill_(torch.nan)
    save_file(tensors, path, metadata={"format": "pt"})


def index_outside(folder):
    """Weights in a file above the directory."""
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


PROCESSOR = (
    "processor_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
)  # fmt: skip
README = f"---\nlicense: mit\nlicense_link: {TOKEN}\n---\n"
SECRET = r"holds a Hub token \(hf_\.\.\.\): nothing was sent"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed("config.json", lambda text: text.replace("{", f'{{"a": "{TOKEN}",', 1)), SECRET),
        (changed("README.md", lambda text: README), SECRET),
        (changed("chat_template.jinja", lambda text: f"{{# {TOKEN} #}}{text}"), SECRET),
        (token_in_header, SECRET),
        (outside, "generation_config.json: is a link to a file outside tiny-w4a16: put the file"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            "holds model.safetensors and model.safetensors.index.json, two models: delete the one",
        ),
        (index_outside, r"index.* names .*\.\./outside.safetensors"),
        (removed("model.safetensors"), "holds no model.safetensors: "),
        (removed(*PROCESSOR), "holds no processor that loads .*: save the model's processor there"),
        (cut_weights, "model.safetensors: is no (readable|complete) safetensors file"),
        (nan, "NaN|infinity"),
        (
            changed("config.json", lambda text: text.replace("quantization_config", "no_config")),
            "tiny-w4a16: is not quantized by qvlm_hf: name a directory that qvlm quantize wrote",
        ),
        (removed("config.json"), "tiny-w4a16: holds no config.json: name the directory"),
        (changed("config.json", lambda text: "{"), "tiny-w4a16: its config.json is no JSON"),
        (changed("qvlm_report.json", lambda text: "{"), "^qvlm_report.json: is no JSON .*: delete"),
    ],
)
def test_directories_that_are_not_published(hub, api, folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as failed:
        publish_folder(folder, REPO, api=api)
    assert "\n" not in str(failed.value)
    assert TOKEN not in str(failed.value)
    assert not hub.repos


def test_the_token_in_use_is_found_whatever_its_form(folder):
    (folder / "config.json").write_text('{"note": "plain-secret"}')
    with pytest.raises(ValueError, match=r"^config.json: holds a Hub token"):
        check_secrets(folder, ["config.json"], "plain-secret")


# ---- what the Hub holds --------------------------------------------------------------------------


WEIGHTS = "model.safetensors"


def other_weights(data):
    """As many bytes and the same header."""
    return Blob(data[:-1] + bytes([data[-1] ^ 1]), lfs=True)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda _: Blob(b"{}")),
        (WEIGHTS, other_weights),
        ("model-00001-of-00002.safetensors", lambda _: Blob(b"0", lfs=True)),
        ("tokenizer.json", None),
    ],
)
def test_what_the_hub_holds_is_compared_with_what_was_sent(hub, api, folder, name, change):
    published = publish_folder(folder, REPO, api=api)
    repo, payload = hub.repo(REPO), choose_files(folder, ("README.md",))
    verify(api, folder, payload, repo_id=REPO, revision=published.revision)
    files = dict(repo.commit().files)
    old = files.pop(name, None)
    files |= {name: change(old and old.content)} if change else {}
    message = f"^me/tiny: the Hub does not hold what was sent .{name} is missing, another or left"
    with pytest.raises(OSError, match=message):
        verify(api, folder, payload, repo_id=REPO, revision=repo.advance(files, "tampered"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_another_hash_than_the_file_has_is_noticed(hub, api, transfer, folder, name):
    hub.wrong_etag(re.escape(name))
    with pytest.raises(OSError, match=rf"^me/tiny: .* what was sent .{name} is missing, another"):
        publish_folder(folder, REPO, api=api)
    hub.heal()
    assert publish_folder(folder, REPO, api=api).revision == hub.repo(REPO).commit().oid


# ---- from a shell --------------------------------------------------------------------------------


def test_the_command(hub, folder, capsys):
    """As the errors write it: every option of `publish`."""
    (folder / "secret.env").write_text("no")
    asked = {"private": True, "revision": "dev", "commit_message": "it's new", "license": "mit"}
    asked |= {"base_model": "me/base"}
    for options in (asked, {"create_pr": True}):
        command = publish_command(folder, Target(repo_id=REPO, **options)).partition(": qvlm ")[2]
        assert main(shlex.split(command)) == 0
    repo, printed = hub.repo(REPO), capsys.readouterr().out.splitlines()
    commit = repo.commit("dev")
    assert printed[0].endswith(f" files to me/tiny: {hub.endpoint}/me/tiny/commit/{commit.oid}")
    assert printed[1] == "not sent: secret.env"
    assert printed[2].endswith(f" files to me/tiny: {hub.endpoint}/me/tiny/discussions/1")
    assert (repo.private, commit.title) == (True, "it's new")
    card = content(hub, revision="dev")["README.md"].decode()
    assert {"license: mit", "base_model: me/base"} <= set(card.splitlines())
    assert main(["publish", str(folder), "you/tiny"]) == 1
    message = "qvlm: error: you/tiny: the token's user may not make repositories for 'you'"
    assert capsys.readouterr().err.startswith(message)


def test_quantize_and_push(hub, source, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert main(["quantize", str(source), *ROUND, *output, "--push-to-hub", REPO]) == 0
    assert "published" in capsys.readouterr().out
    assert not hub.repo(REPO).private
    for wrong, message in (
        (["--push-to-hub", "you/tiny"], "may not make repositories for 'you'"),
        (["--private"], "--private is of the repository: name it with --push-to-hub REPO"),
    ):  # before anything is read
        assert main(["quantize", "no-model", "--output", str(tmp_path / "2"), *wrong]) == 1
        assert message in capsys.readouterr().err


def test_no_token_in_any_output(hub, folder, no_waiting, capfd, caplog):
    hub.fail("POST", "/preupload/", 500, times=2)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert main(["publish", str(folder), REPO, "--debug"]) == 0
    captured = capfd.readouterr()
    said = [captured.out, captured.err, caplog.text, *(str(entry.message) for entry in warned)]
    assert hub.token not in "".join(said)
    for name, data in content(hub).items():
        assert hub.token.encode() not in data, name
