"""Publishing over real HTTP: what arrives, who may, what is refused, and what an interruption leaves behind."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _cache_assets
from tiny_models import save_tiny, tiny_messages, tiny_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

import qvlm_hf
from qvlm_hf import QVLMConfig, publish, publish_folder, save_quantized
from qvlm_hf.calibration.samples import Sample, collate
from qvlm_hf.cli import main
from qvlm_hf.demo import model_dir
from qvlm_hf.hub.errors import explained
from qvlm_hf.hub.payload import check_secrets, choose_files, read_header
from qvlm_hf.hub.publish import Target, check_target, fetch_card, upload, verify

pytestmark = pytest.mark.hub

SEARCH = {
    "num_samples": 4,
    "batch_size": 4,
    "percentiles": (1.0, 0.999),
    "margins": (),
    "max_block_depth": 2,
}
TOKEN = "hf_" + "x" * 34


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model in full precision."""
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny-llava")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model(source):
    return AutoModelForImageTextToText.from_pretrained(
        source, quantization_config=QVLMConfig(scheme="W4A16")
    )


@pytest.fixture(scope="module")
def other(source):
    """A model that answers differently."""
    return AutoModelForImageTextToText.from_pretrained(
        source, quantization_config=QVLMConfig(scheme="W2A16")
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model, processor):
    """`model` in one file and in shards."""
    root = tmp_path_factory.mktemp("saved")
    report = model.hf_quantizer.report
    return {
        "single": save_quantized(model, processor, root / "single", report=report),
        "sharded": save_quantized(
            model, processor, root / "sharded", report=report, max_shard_size="60KB"
        ),
    }


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model that a test may change."""
    return Path(shutil.copytree(saved["single"], tmp_path / "tiny-w4a16"))


@pytest.fixture
def sharded(saved, tmp_path):
    return Path(shutil.copytree(saved["sharded"], tmp_path / "tiny-sharded"))


@pytest.fixture
def api(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return HfApi(endpoint=hub.endpoint, token=hub.token)


def inputs(processor, dtype=torch.float32):
    samples = [
        Sample(messages=tuple(record["messages"][:1]), origin="test")
        for record in tiny_messages(2, seed=7)
    ]
    return {
        name: t.to(dtype) if t.is_floating_point() else t
        for name, t in collate(samples, processor).inputs.items()
    }


def logits(model, fed):
    with torch.no_grad():
        return model(**fed).logits


def loaded(repo_id, **options):
    return AutoModelForImageTextToText.from_pretrained(repo_id, **options)


def content(hub, repo_id, revision="main"):
    return {
        name: data
        for name, data in hub.repo(repo_id).files(revision).items()
        if name != ".gitattributes"
    }


def local(folder, names):
    return {name: (folder / name).read_bytes() for name in names}


# ---- what arrives --------------------------------------------------------------------------------


def test_another_process_loads_what_was_published(
    hub, api, source, processor, tmp_path, monkeypatch
):
    models = {}
    demo = AutoModelForImageTextToText.from_pretrained(
        model_dir(), quantization_config=QVLMConfig(scheme="W4A16")
    )
    demo_processor = AutoProcessor.from_pretrained(model_dir())
    models["me/demo-w4a16"] = (demo, inputs(demo_processor, demo.dtype))
    published = publish(demo, demo_processor, "me/demo-w4a16", api=api)
    assert published.files == tuple(sorted(content(hub, "me/demo-w4a16")))
    assert published.revision == hub.repo("me/demo-w4a16").commit().oid
    assert published.commit_url == f"{hub.endpoint}/me/demo-w4a16/commit/{published.revision}"
    assert (published.pull_request_url, published.folder) == (None, None)
    config = QVLMConfig(scheme="W4A4", dataset=tiny_messages(4), processor=processor, **SEARCH)
    searched = AutoModelForImageTextToText.from_pretrained(source, quantization_config=config)
    models["me/tiny-w4a4"] = (searched, inputs(processor))
    monkeypatch.setattr(
        constants, "HF_HUB_DISABLE_XET", False
    )  # the second one travels the other way
    publish(
        searched, processor, "tiny-w4a4", private=True, api=api
    )  # a bare name is the user's own
    torch.save({name: fed for name, (_, fed) in models.items()}, tmp_path / "inputs.pt")
    script = Path(__file__).parent / "fresh_load.py"
    subprocess.run(
        [sys.executable, script, tmp_path / "inputs.pt", tmp_path / "out.pt", *models],
        env=hub.environment(tmp_path / "empty"),
        check=True,
        timeout=300,
    )
    found = torch.load(tmp_path / "out.pt")
    for name, (model, fed) in models.items():
        assert torch.equal(found[name], logits(model, fed)), name


def test_one_commit_holds_everything_and_a_second_one_sends_nothing(hub, api, transfer, folder):
    first = publish_folder(folder, "me/tiny", api=api)
    assert content(hub, "me/tiny") == local(folder, first.files)
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "qvlm_report.json",
        "tokenizer.json",
    } <= set(first.files)
    assert [commit.title for commit in hub.repo("me/tiny").history()] == [
        "Upload a model that qvlm_hf quantized to W4A16",
        "initial commit",
    ]
    sent = len(hub.calls("PUT", "/upload/"))
    assert publish_folder(folder, "me/tiny", api=api).revision == first.revision
    assert len(hub.calls("PUT", "/upload/")) == sent
    assert len(hub.repo("me/tiny").history()) == 2


def test_only_what_belongs_goes_up(hub, api, folder):
    for name in ("secret.env", "notes.txt", "optimizer.pt", ".env", "pytorch_model.bin"):
        (folder / name).write_text(f"TOKEN={TOKEN}")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "config.json").write_text("{}")
    published = publish_folder(folder, "me/tiny", api=api)
    assert set(published.left_out) == {
        "secret.env",
        "notes.txt",
        "optimizer.pt",
        ".env",
        "pytorch_model.bin",
        "checkpoint-1",
    }
    assert set(content(hub, "me/tiny")) == set(published.files)
    assert not set(published.files) & set(published.left_out)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_weights_that_are_no_part_of_the_model_are_not_counted(hub, api, saved, tmp_path, kind):
    clean = Path(shutil.copytree(saved[kind], tmp_path / "clean"))
    publish_folder(clean, "me/tiny", api=api)
    before = content(hub, "me/tiny")
    folder = Path(shutil.copytree(saved[kind], tmp_path / "clean-too"))
    shutil.copy(saved["single"] / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    (folder / "adapter_model.safetensors").write_text("x")
    published = publish_folder(folder, "me/tiny", api=api)
    assert published.left_out == ("adapter_model.safetensors", "model-00001-of-00001.safetensors")
    assert content(hub, "me/tiny") == before  # the card's size too


@pytest.mark.parametrize(("before", "after"), [("sharded", "single"), ("single", "sharded")])
def test_stale_weights_are_never_loaded(hub, api, other, processor, saved, tmp_path, before, after):
    size = "60KB" if before == "sharded" else "50GB"
    save_quantized(
        other, processor, tmp_path / "old", report=other.hf_quantizer.report, max_shard_size=size
    )
    publish_folder(tmp_path / "old", "me/tiny", api=api)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id="me/tiny")
    api.upload_file(path_or_fileobj=b"theirs", path_in_repo="notes.txt", repo_id="me/tiny")
    new = Path(shutil.copytree(saved[after], tmp_path / "new"))
    published = publish_folder(new, "me/tiny", api=api)
    assert content(hub, "me/tiny") == {**local(new, published.files), "notes.txt": b"theirs"}
    assert torch.equal(
        logits(loaded("me/tiny"), inputs(processor)), logits(loaded(new), inputs(processor))
    )
    assert not torch.equal(logits(loaded(new), inputs(processor)), logits(other, inputs(processor)))


def test_a_private_repository_is_private(hub, api, folder):
    publish_folder(folder, "me/tiny", private=True, api=api)
    assert hub.repo("me/tiny").private
    with pytest.raises(OSError, match=r"me/tiny"):
        loaded("me/tiny", token=hub.add_user("stranger"))
    assert (
        publish_folder(folder, "me/tiny", api=api).repo_id == "me/tiny"
    )  # None leaves it as it is
    assert hub.repo("me/tiny").private


@pytest.mark.parametrize("private", [True, False])
def test_an_existing_repository_of_the_other_kind_is_refused(hub, api, folder, private):
    api.create_repo("me/tiny", private=not private)
    state = "public" if private else "private"
    with pytest.raises(
        ValueError,
        match=f"^me/tiny: is {state} on the Hub already, and private={private} was asked for: "
        f"change it",
    ):
        publish_folder(folder, "me/tiny", private=private, api=api)
    assert not hub.calls("POST", "/commit/")


def test_a_branch_is_made_and_main_is_left_alone(hub, api, folder, model, processor):
    published = publish_folder(folder, "me/tiny", revision="w4a16", api=api)
    assert content(hub, "me/tiny") == {}
    assert content(hub, "me/tiny", "w4a16") == local(folder, published.files)
    found = logits(loaded("me/tiny", revision="w4a16"), inputs(processor))
    assert torch.equal(found, logits(model, inputs(processor)))
    assert (
        publish_folder(folder, "me/tiny", revision="w4a16", api=api).revision == published.revision
    )


def test_a_pull_request_to_somebody_elses_repository(hub, api, transfer, folder):
    api.create_repo("me/tiny")
    stranger = HfApi(endpoint=hub.endpoint, token=hub.add_user("stranger"))
    published = publish_folder(folder, "me/tiny", create_pr=True, api=stranger)
    (pull,) = hub.repo("me/tiny").pull_requests.values()
    assert published.pull_request_url == f"{hub.endpoint}/me/tiny/discussions/{pull.num}"
    assert content(hub, "me/tiny") == {}
    assert content(hub, "me/tiny", pull.ref) == local(folder, published.files)
    (folder / "notes.txt").write_text("what the reviewer asked for is in the card")
    again = publish_folder(folder, "me/tiny", revision=pull.ref, license="mit", api=stranger)
    assert content(hub, "me/tiny", pull.ref) == local(folder, again.files)
    assert len(hub.repo("me/tiny").pull_requests) == 1


def test_the_card_takes_the_licence_of_the_base_model(hub, api, folder):
    api.create_repo("me/base")
    text = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# base"
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="me/base")
    publish_folder(folder, "me/tiny", base_model="me/base", api=api)
    data = api.model_info("me/tiny").card_data
    assert (data.license, data.base_model, data["base_model_relation"], data["quantized_by"]) == (
        "apache-2.0",
        "me/base",
        "quantized",
        "me",
    )
    assert "base_model:quantized:me/base" in api.model_info("me/tiny").tags


@pytest.mark.parametrize("name", [None, "me/nowhere", "me/empty", "me/broken"])
def test_a_base_model_without_card_does_not_stop_it(hub, api, name):
    for repo_id, text in (("me/empty", None), ("me/broken", b"---\n: [\n---\n")):
        api.create_repo(repo_id)
        if text is not None:  # not through the client, which would refuse it
            store, repo = hub.store, hub.repo(repo_id)
            repo.advance("refs/heads/main", {"README.md": store.regular(text)}, "broken", "", "me")
    assert fetch_card(api, name) is None


# ---- in Python -----------------------------------------------------------------------------------


def test_a_model_from_the_hub_is_quantized_and_pushed_when_it_ends(hub, api, source, processor):
    api.create_repo("me/tiny-llava")
    processor.save_pretrained(source)
    card = b"---\nlicense: mit\n---\n# tiny"
    api.upload_folder(repo_id="me/tiny-llava", folder_path=source)
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/tiny-llava")
    config = QVLMConfig(
        scheme="W4A16",
        processor=processor,
        push_to_hub=True,
        hub_model_id="tiny-w4a16",
        hub_private=True,
    )
    model = loaded("me/tiny-llava", quantization_config=config)
    published = model.hf_quantizer.published
    assert published.repo_id == "me/tiny-w4a16"
    assert hub.repo("me/tiny-w4a16").private
    assert torch.equal(
        logits(loaded("me/tiny-w4a16"), inputs(processor)), logits(model, inputs(processor))
    )
    data = api.model_info("me/tiny-w4a16").card_data
    assert (data.base_model, data.license) == ("me/tiny-llava", "mit")
    quantization = json.loads(content(hub, "me/tiny-w4a16")["config.json"])["quantization_config"]
    assert not {"push_to_hub", "hub_model_id", "hub_private"} & set(quantization)
    again = loaded("me/tiny-w4a16")  # its report comes from where it was loaded
    assert publish(again, processor, "me/copy", api=api).files == published.files
    assert (
        content(hub, "me/copy")["qvlm_report.json"]
        == content(hub, "me/tiny-w4a16")["qvlm_report.json"]
    )
    again.hf_quantizer.quantization_config.provenance = {
        "seed": 1
    }  # as of another branch, whose report lies on main
    assert "qvlm_report.json" not in publish(again, processor, "me/copy", api=api).files
    assert "qvlm_report.json" not in content(hub, "me/copy")


def test_permission_is_asked_for_before_anything_is_read(hub, api, source, processor, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("reader", role="read"))
    config = QVLMConfig(
        dataset="nowhere.jsonl", processor=processor, push_to_hub=True, hub_model_id="me/tiny"
    )
    with pytest.raises(PermissionError, match=r"^me/tiny: the token may only read"):
        loaded(source, quantization_config=config)  # and not that there is no nowhere.jsonl


def test_a_push_needs_the_processor(hub, api, source):
    config = QVLMConfig(scheme="W4A16", push_to_hub=True, hub_model_id="me/tiny")
    with pytest.raises(
        ValueError,
        match=r"^push_to_hub=True publishes the processor too: pass QVLMConfig\(\.\.\., processor=",
    ):
        loaded(source, quantization_config=config)


def test_a_push_that_fails_loses_nothing(hub, api, source, processor, model, no_waiting, capsys):
    hub.fail("POST", "/commit/", 500, times=None)
    config = QVLMConfig(
        scheme="W4A16",
        processor=processor,
        push_to_hub=True,
        hub_model_id="me/tiny",
        hub_private=True,
    )
    with pytest.warns(
        UserWarning, match=r"^push_to_hub: me/tiny: the Hub is out of order"
    ) as warned:
        kept = loaded(source, quantization_config=config)
    assert torch.equal(logits(kept, inputs(processor)), logits(model, inputs(processor)))
    assert kept.hf_quantizer.published is None
    (message,) = [str(entry.message) for entry in warned if "push_to_hub" in str(entry.message)]
    command = re.search(r"this publishes it: qvlm (publish \S+ me/tiny --private)$", message)[
        1
    ].split()
    hub.heal()
    assert main(command) == 0  # the command that the warning shows
    assert "published" in capsys.readouterr().out
    assert torch.equal(
        logits(loaded("me/tiny"), inputs(processor)), logits(model, inputs(processor))
    )


def test_a_hub_that_is_gone_when_calibration_ends_loses_nothing(
    hub, api, source, processor, no_waiting, tmp_path
):
    class Unplugged:
        def on_calibration_end(self, model, report):
            hub.fail(".*", "", 401, times=None)

    config = QVLMConfig(
        scheme="W4A16",
        processor=processor,
        push_to_hub=True,
        hub_model_id="me/tiny",
        callbacks=[Unplugged()],
    )
    with pytest.warns(
        UserWarning, match=r"^push_to_hub: me/tiny: the Hub does not accept the token .401"
    ) as warned:
        kept = loaded(source, quantization_config=config)
    folder = re.search(r"qvlm publish (\S+) me/tiny$", str(warned[-1].message))[1]
    assert torch.equal(logits(loaded(folder), inputs(processor)), logits(kept, inputs(processor)))


def test_a_callback_that_raises_stops_the_push(hub, api, source, processor):
    class Unsatisfied:
        def on_calibration_end(self, model, report):
            raise RuntimeError("not good enough")

    config = QVLMConfig(
        scheme="W4A16",
        processor=processor,
        push_to_hub=True,
        hub_model_id="me/tiny",
        callbacks=[Unsatisfied()],
    )
    with pytest.raises(RuntimeError, match="not good enough"):
        loaded(source, quantization_config=config)
    assert "me/tiny" not in hub.repos


def test_publish_names_the_folder_and_the_command_when_it_fails(
    hub, api, model, processor, no_waiting
):
    hub.fail("POST", "/commit/", 403)
    options = {
        "revision": "dev",
        "commit_message": "it's new",
        "base_model": "me/base",
        "license": "mit",
    }
    with pytest.raises(PermissionError) as failed:
        publish(model, processor, "me/tiny", **options, api=api)
    (note,) = failed.value.__notes__
    command = shlex.split(note.removeprefix("The model is saved; this publishes it: qvlm "))
    folder = command[1]
    assert command == [
        "publish", folder, "me/tiny", "--revision", "dev", "--message", "it's new", "--base-model", "me/base", "--license", "mit"
    ]  # fmt: skip
    assert main(command) == 0
    assert hub.repo("me/tiny").commit("dev").title == "it's new"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"license": "apache2"},
            "license='apache2' is no identifier of the Hub: take one that it lists",
        ),
        ({"license": ""}, "license='' is no identifier of the Hub"),
        (
            {"base_model": "/models/base"},
            "model card: base_model='/models/base' is no Hub id: write 'owner/name', or leave it "
            "out.",
        ),
        (
            {"commit_message": f"with {TOKEN}"},
            r"commit_message: holds a Hub token \(hf_\.\.\.\): nothing was sent; remove it",
        ),
        ({"revision": "a..b"}, "revision='a..b' is no branch name"),
    ],
)
def test_wrong_arguments_fail_before_anything_is_saved(
    hub, api, model, processor, folder, tmp_path, bad, message
):
    before = local(folder, ["README.md"])
    for act in (
        lambda: publish(model, processor, "me/tiny", **bad, api=api),
        lambda: publish_folder(folder, "me/tiny", **bad, api=api),
    ):
        with pytest.raises(ValueError, match=f"^{message}") as failed:
            act()
        assert TOKEN not in str(failed.value)
        assert not getattr(failed.value, "__notes__", [])
    assert not (tmp_path / "assets").exists()
    assert local(folder, ["README.md"]) == before
    assert not hub.requests


def test_a_tokenizer_is_no_processor(hub, api, source, model, processor, tmp_path):
    message = r"is no chat processor .*; take the one that was saved with the model"
    with pytest.raises(ValueError, match=message):
        publish(model, processor.tokenizer, "me/tiny", api=api)
    config = QVLMConfig(
        scheme="W4A16", processor=processor.tokenizer, push_to_hub=True, hub_model_id="me/tiny"
    )
    with pytest.raises(ValueError, match=message):
        loaded(source, quantization_config=config)
    assert not (tmp_path / "assets").exists()
    assert not hub.requests


def test_a_home_that_cannot_be_written_is_found_at_once(
    hub, api, source, model, processor, tmp_path
):
    (tmp_path / "assets").write_text("a file, because root may write into every directory")
    message = r"^publish saves below HF_HOME/assets, where nothing can be written .*: set HF_HOME to a directory that can be\.$"
    with pytest.raises(OSError, match=message):
        publish(model, processor, "me/tiny", api=api)
    config = QVLMConfig(
        dataset="nowhere.jsonl", processor=processor, push_to_hub=True, hub_model_id="me/tiny"
    )
    with pytest.raises(OSError, match=message):
        loaded(source, quantization_config=config)  # and not that there is no nowhere.jsonl
    assert "me/tiny" not in hub.repos


def test_a_token_with_a_line_break(hub, api, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert publish_folder(folder, "me/tiny", token=f" {hub.token}\n").repo_id == "me/tiny"
    with pytest.raises(
        ValueError,
        match=r"^token= is empty: leave it out to use the one of `hf auth login` or HF_TOKEN\.",
    ):
        publish_folder(folder, "me/tiny", token="\n")
    with pytest.raises(
        ValueError,
        match=r"^the token of api= has spaces or line breaks around it: make the HfApi with",
    ) as failed:
        publish_folder(folder, "me/tiny", api=HfApi(endpoint=hub.endpoint, token=f"{hub.token}\n"))
    assert hub.token not in str(failed.value)


def test_nothing_is_left_when_it_succeeds(hub, api, model, processor, tmp_path):
    publish(model, processor, "me/tiny", api=api)
    assert not [path for path in (tmp_path / "assets").rglob("*") if path.is_file()]


def test_kernels_and_attention_of_the_model_do_not_disturb_the_self_check(
    hub, api, source, processor
):
    model = AutoModelForImageTextToText.from_pretrained(
        source, quantization_config=QVLMConfig(scheme="W4A16"), attn_implementation="eager"
    )
    qvlm_hf.set_backend(model, "reference")
    assert (
        publish(model, processor, "me/tiny", api=api).revision == hub.repo("me/tiny").commit().oid
    )


def test_a_model_that_loads_differently_is_not_published(hub, api, model, processor, tmp_path):
    hook = model.lm_head.register_forward_hook(lambda module, args, output: output * 1.001)
    try:
        with pytest.raises(
            RuntimeError,
            match=r"^me/tiny: the saved model's logits differ from those of the model in memory by "
            r"up to",
        ):
            publish(model, processor, "me/tiny", api=api)
    finally:
        hook.remove()
    assert "me/tiny" not in hub.repos
    assert not list((tmp_path / "assets").rglob("*.safetensors"))


def test_a_processor_that_loads_differently_is_not_published(hub, api, model):
    processor = tiny_processor()
    plain, make = type(processor), processor.__class__.__call__

    class Brighter(plain):
        """Does what no saved file says."""

        def __call__(self, *args, **options):
            made = make(self, *args, **options)
            made["pixel_values"] = made["pixel_values"] * 2
            return made

    processor.__class__ = Brighter
    Brighter.__name__ = plain.__name__  # what is saved
    with pytest.raises(
        RuntimeError, match=r"^me/tiny: the saved processor does not turn a picture"
    ):
        publish(model, processor, "me/tiny", api=api)
    assert "me/tiny" not in hub.repos


def test_publish_needs_a_quantized_model_and_its_processor(hub, api, source, model, processor):
    for given in ((loaded(source), processor), (model, None)):
        with pytest.raises(
            ValueError,
            match=r"^publish needs a quantized model and its processor: quantize it first",
        ):
            publish(*given, "me/tiny", api=api)
    with pytest.raises(ValueError, match=r"^publish takes token= or api=, not both"):
        publish(model, processor, "me/tiny", api=api, token=TOKEN)


# ---- interruptions -------------------------------------------------------------------------------


def test_an_upload_cut_in_the_middle_and_repeated_is_complete(
    hub, api, no_waiting, sharded, model, processor
):
    shards = sorted(sharded.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    assert len(shards) > 3
    hub.cut(
        "/upload/", after_bytes=shards[-2].stat().st_size, times=None
    )  # the largest never passes
    with pytest.raises(ConnectionError, match=r"^me/tiny: the Hub cannot be reached") as failed:
        publish_folder(sharded, "me/tiny", api=api)
    assert "repeat the command" in str(failed.value)
    assert content(hub, "me/tiny") == {}  # a reader sees nothing of it
    arrived = len([put for put in hub.calls("PUT", "/upload/") if put.status == 200])
    hub.heal()
    published = publish_folder(sharded, "me/tiny", api=api)
    assert content(hub, "me/tiny") == local(sharded, published.files)
    assert len([put for put in hub.calls("PUT", "/upload/") if put.status == 200]) == len(shards)
    assert arrived < len(shards)
    assert torch.equal(
        logits(loaded("me/tiny"), inputs(processor)), logits(model, inputs(processor))
    )


def test_the_old_model_stays_until_the_new_one_is_complete(
    hub, api, transfer, no_waiting, folder, other, processor, tmp_path
):
    old = save_quantized(other, processor, tmp_path / "old", report=other.hf_quantizer.report)
    published = publish_folder(old, "me/tiny", api=api)
    hub.fail("POST", "/commit/", 503, times=None)
    with pytest.raises(ConnectionError, match=r"^me/tiny: the Hub is out of order .503"):
        publish_folder(folder, "me/tiny", api=api)
    assert content(hub, "me/tiny") == local(old, published.files)
    hub.heal()
    published = publish_folder(folder, "me/tiny", api=api)
    assert content(hub, "me/tiny") == local(folder, published.files)


def test_a_commit_whose_answer_is_lost_is_found_by_the_next_attempt(
    hub, api, transfer, no_waiting, folder
):
    hub.lose_answer("POST", "/commit/", times=None)
    with pytest.raises(ConnectionError, match=r"^me/tiny: the Hub cannot be reached"):
        publish_folder(folder, "me/tiny", api=api)
    hub.heal()
    head = hub.repo("me/tiny").commit().oid
    published = publish_folder(folder, "me/tiny", api=api)
    assert published.revision == head
    assert content(hub, "me/tiny") == local(folder, published.files)


# ---- refusals ------------------------------------------------------------------------------------

STATUSES = {
    400: (OSError, "the Hub refuses the request .400: A fault of the tests.: mend what it names"),
    401: (
        PermissionError,
        "the Hub does not accept the token .401.*: run `hf auth login` or set HF_TOKEN",
    ),
    403: (
        PermissionError,
        "the token may not write there .403.*: take a token with write permission, another repository, or open a pull request",
    ),
    404: (
        FileNotFoundError,
        "no such repository or revision, or a private one that the token may not see .404.*: check "
        "both names",
    ),
    409: (
        OSError,
        "something else changed the repository at the same time .409.*: repeat the command",
    ),
    413: (OSError, "a file is too large for the Hub .413.*: save with smaller shards"),
    418: (OSError, "the Hub refuses .418.*: see what it says"),
    429: (ConnectionError, "too many requests .429.*: wait some minutes and repeat the command"),
    500: (
        ConnectionError,
        "the Hub is out of order .500: A fault of the tests.: repeat the command; what has arrived "
        "is not sent again",
    ),
}


def test_errors_of_the_machine_and_of_hf_xet():
    hf_xet = pytest.importorskip("hf_xet")
    with (
        pytest.raises(
            PermissionError,
            match=r"^me/tiny: the Hub does not accept the token .token expired.: run `hf auth "
            r"login`",
        ),
        explained("me/tiny"),
    ):
        raise hf_xet.XetAuthenticationError("token expired")
    with (
        pytest.raises(FileNotFoundError, match=r"No such file or directory: 'no file'"),
        explained("me/tiny"),
    ):
        Path("no file").read_bytes()


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "whoami"), ("POST", "/preupload/"), ("POST", "/commit/")]
)
def test_refusals_are_one_line_that_says_what_to_do(
    hub, api, no_waiting, saved, status, method, path
):
    kind, message = STATUSES[status]
    hub.fail(method, path, status, times=None)
    payload = choose_files(saved["single"], ())
    target = Target(repo_id="me/tiny", user="me")
    ask = (
        (lambda: check_target(api, "me/tiny"))
        if path == "whoami"
        else lambda: upload(api, saved["single"], target, payload, message="x")
    )
    with pytest.raises(kind, match=f"^me/tiny: {message}") as failed:
        ask()
    assert type(failed.value) is kind
    assert "\n" not in str(failed.value)
    assert hub.token not in repr(failed.value)


def test_a_stranger_may_not_write_and_a_reader_may_not_either(hub, api):
    api.create_repo("me/tiny")
    stranger = HfApi(endpoint=hub.endpoint, token=hub.add_user("stranger", orgs=("club",)))
    with pytest.raises(
        PermissionError,
        match=r"^me/tiny: the token may not write there .403: Forbidden: you have no right to "
        r"write to me/tiny",
    ):
        check_target(stranger, "me/tiny")
    with pytest.raises(
        PermissionError,
        match=r"^me/new: the token's user may not make repositories for 'me': name one of "
        r"stranger, club",
    ):
        check_target(stranger, "me/new")
    with pytest.raises(
        FileNotFoundError,
        match=r"^me/new: there is no such repository to open a pull request in: check its name",
    ):
        check_target(stranger, "me/new", create_pr=True)
    assert check_target(stranger, "me/tiny", create_pr=True).repo_id == "me/tiny"
    assert check_target(stranger, "club/new").user == "stranger"
    reader = HfApi(endpoint=hub.endpoint, token=hub.add_user("reader", role="read"))
    with pytest.raises(
        PermissionError, match=r"^me/tiny: the token may only read: make one with write permission"
    ):
        check_target(reader, "me/tiny")
    assert set(hub.repos) == {"me/tiny"}  # nothing was made


def test_without_token_network_or_permission_to_ask(hub, api, monkeypatch):
    wrong = HfApi(endpoint=hub.endpoint, token=TOKEN)
    with pytest.raises(
        PermissionError, match=r"^me/tiny: the Hub does not accept the token .401"
    ) as failed:
        check_target(wrong, "me/tiny")
    assert TOKEN not in str(failed.value)
    with pytest.raises(
        ConnectionError,
        match=r"^me/tiny: the Hub cannot be reached .*: check the network and repeat the command",
    ):
        check_target(HfApi(endpoint="http://127.0.0.1:9", token=hub.token), "me/tiny")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        PermissionError,
        match=r"^me/tiny: there is no Hub token: run `hf auth login` or set HF_TOKEN",
    ):
        check_target(HfApi(endpoint=hub.endpoint), "me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError,
        match=r"^me/tiny: HF_HUB_OFFLINE is set, so the Hub is not asked: unset it to publish",
    ):
        check_target(api, "me/tiny")


@pytest.mark.parametrize(
    "repo_id", ["", "a/b/c", "../x", "me/a--b", "/abs/path", "me/x.git", "me/a b", None, 3]
)
def test_names_that_no_repository_has(hub, api, repo_id):
    with pytest.raises(
        ValueError, match=f"^repo_id={re.escape(repr(repo_id))} must be 'owner/name' of letters"
    ) as failed:
        check_target(api, repo_id)
    assert "\n" not in str(failed.value)
    assert not hub.requests


@pytest.mark.parametrize(
    "revision",
    ["", "-x", "a..b", "a~b", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "main ", "a\nb", "a\n", "x.lock", "x.lock/y", ".x", "a/.x", "x.",
     "/x", "x/", "a//b", "@", "a@{1}", "HEAD", "refs", "refs/heads/dev", "refs/pr/", "refs/pr/x", "refs/pr/0", "01234567" * 5],
)  # fmt: skip
def test_names_that_no_branch_has(hub, api, revision):
    with pytest.raises(
        ValueError,
        match=f"^revision={re.escape(repr(revision))} is no branch name: take letters, .* or "
        f"'refs/pr/N'.$",
    ):
        check_target(api, "me/tiny", revision=revision)
    assert not hub.requests


@pytest.mark.parametrize(
    "revision",
    [
        None,
        "main",
        "dev",
        "w4a4-v1.0",
        "me/try_2",
        "feature@2",
        "0123456",
        "refs/pr/12",
        "lock",
        "é",
    ],
)
def test_names_that_branches_have(hub, api, revision):
    assert check_target(api, "me/tiny", revision=revision).revision == revision


def test_a_pull_request_is_against_main(hub, api):
    with pytest.raises(
        ValueError,
        match=r"^create_pr=True opens a pull request against main: leave out revision='dev'",
    ):
        check_target(api, "me/tiny", create_pr=True, revision="dev")


def in_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": f"pushed with {TOKEN}"}))


def in_readme(folder):
    (folder / "README.md").write_text(f"---\nlicense: mit\nlicense_link: {TOKEN}\n---\n")


def in_template(folder):
    (folder / "chat_template.jinja").write_text(
        "{# " + TOKEN + " #}" + (folder / "chat_template.jinja").read_text()
    )


def in_header(folder):
    """In the metadata of the weights."""
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["note"] = TOKEN
    written = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        len(written).to_bytes(8, "little") + written + data[8 + size :]
    )


@pytest.mark.parametrize("plant", [in_config, in_readme, in_template, in_header])
def test_a_token_in_a_file_is_refused_before_anything_is_sent(hub, api, folder, plant):
    plant(folder)
    with pytest.raises(
        ValueError, match=r"holds (a Hub token|something like a Hub token)"
    ) as failed:
        publish_folder(folder, "me/tiny", api=api)
    assert TOKEN not in str(failed.value)
    assert "\n" not in str(failed.value)
    assert "me/tiny" not in hub.repos


def test_the_token_in_use_is_found_whatever_its_form(hub, api, folder):
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("{", '{"note": "plain-secret",', 1)
    )
    with pytest.raises(ValueError, match=r"^config.json: holds a Hub token"):
        check_secrets(folder, ["config.json"], "plain-secret")


def test_a_cut_weight_file_has_no_header(folder):
    cut_weights(folder)
    with pytest.raises(
        ValueError,
        match=r"^model.safetensors: is no complete safetensors file: save the model again",
    ):
        read_header(folder / "model.safetensors")


def outside(folder):
    (folder / "generation_config.json").rename(folder.parent / "elsewhere.json")
    (folder / "generation_config.json").symlink_to(folder.parent / "elsewhere.json")


def two_models(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_processor(folder):
    for name in (
        "processor_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    ):
        (folder / name).unlink()


def cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:1000])


def full_precision(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def no_config(folder):
    (folder / "config.json").unlink()


def cut_config(folder):
    (folder / "config.json").write_text("{")


def cut_report(folder):
    (folder / "qvlm_report.json").write_text("{")


def other_report(folder):
    (folder / "qvlm_report.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            outside,
            "generation_config.json: is a link to a file outside tiny-w4a16: put the file itself there",
        ),
        (
            two_models,
            "holds model.safetensors and model.safetensors.index.json, two models: delete the one that is old",
        ),
        (no_weights, "holds no model.safetensors: name the directory that qvlm quantize wrote"),
        (no_processor, "holds no processor that loads .*: save the model's processor there too"),
        (cut_weights, "model.safetensors: is no readable safetensors file"),
        (
            full_precision,
            "^tiny-w4a16: is not quantized by qvlm_hf: name a directory that qvlm quantize wrote",
        ),
        (
            no_config,
            "^tiny-w4a16: has no readable config.json: name a directory that qvlm quantize wrote",
        ),
        (
            cut_config,
            "^tiny-w4a16: has no readable config.json: name a directory that qvlm quantize wrote",
        ),
        (cut_report, "^qvlm_report.json: is no JSON .*: delete it, or quantize the model again"),
        (
            other_report,
            "^qvlm_report.json: cannot be used .*'modules'.*: delete it, or quantize the model "
            "again",
        ),
    ],
)
def test_directories_that_are_not_published(hub, api, folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as failed:
        publish_folder(folder, "me/tiny", api=api)
    assert "\n" not in str(failed.value)
    assert "me/tiny" not in hub.repos


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        ValueError,
        match=r"^model.safetensors.index.json: is no index of weights .\w+.: save the model again.$",
    ):
        choose_files(sharded, ())


def test_an_index_that_leads_out_of_the_directory(hub, api, sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    (sharded.parent / "outside.safetensors").write_bytes(b"secret")
    index.write_text(
        json.dumps(
            content | {"weight_map": content["weight_map"] | {name: "../outside.safetensors"}}
        )
    )
    with pytest.raises(
        ValueError,
        match=r"^model.safetensors.index.json: names '../outside.safetensors', which is no file in "
        r"tiny-sharded",
    ):
        publish_folder(sharded, "me/tiny", api=api)


def test_a_model_that_answers_nan_is_not_published(hub, api, folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file(
        tensors | {name: torch.full_like(tensors[name], torch.nan)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        publish_folder(folder, "me/tiny", api=api)
    assert "me/tiny" not in hub.repos


def shorter(repo, files):
    files["config.json"] = repo.store.regular(b"{}")


def other_content(repo, files):
    files["config.json"] = repo.store.regular(
        bytes(reversed(repo.store.path(files["config.json"].sha256).read_bytes()))
    )


def other_weights(repo, files):
    """As many bytes and the same header."""
    data = repo.store.path(files["model.safetensors"].sha256).read_bytes()
    files["model.safetensors"] = repo.store.pointed(
        repo.store.add([data[:-1], bytes([data[-1] ^ 1])])
    )


def other_header(repo, files):
    """Damaged where it is kept, so that the Hub still tells the right hash."""
    kept = repo.store.path(files["model.safetensors"].sha256)
    data = kept.read_bytes()
    size = int.from_bytes(data[:8], "little")
    swapped = re.sub(rb'"shape":\[(\d+),(\d+)\]', rb'"shape":[\2,\1]', data[8 : 8 + size], count=1)
    kept.write_bytes(data[:8] + swapped + data[8 + size :])


def left_over(repo, files):
    files["model-00001-of-00002.safetensors"] = files["model.safetensors"]


def missing(repo, files):
    del files["tokenizer.json"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (shorter, "config.json"),
        (other_content, "the hash of config.json"),
        (other_weights, "the hash of model.safetensors"),
        (other_header, "the header of model.safetensors"),
        (left_over, "model-00001-of-00002.safetensors is left over"),
        (missing, "tokenizer.json"),
    ],
)
def test_what_the_hub_holds_is_compared_with_what_was_sent(hub, api, folder, change, what):
    published = publish_folder(folder, "me/tiny", api=api)
    repo, payload = hub.repo("me/tiny"), choose_files(folder, ("README.md",))
    verify(api, folder, payload, repo_id="me/tiny", revision=published.revision)
    files = dict(repo.tree())
    change(repo, files)
    commit = repo.advance("refs/heads/main", files, "tampered", "", "me")
    with pytest.raises(
        OSError, match=f"^me/tiny: the Hub does not hold what was sent .{what}.: repeat the command"
    ):
        verify(api, folder, payload, repo_id="me/tiny", revision=commit.oid)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_another_hash_than_the_file_has_is_noticed(hub, api, transfer, folder, name):
    hub.wrong_etag(re.escape(name))
    with pytest.raises(
        OSError,
        match=rf"^me/tiny: the Hub does not hold what was sent .the hash of {name}.: repeat the "
        rf"command",
    ):
        publish_folder(folder, "me/tiny", api=api)
    hub.heal()
    assert publish_folder(folder, "me/tiny", api=api).revision == hub.repo("me/tiny").commit().oid


# ---- from a shell --------------------------------------------------------------------------------


def test_the_command(hub, api, folder, capsys):
    (folder / "secret.env").write_text("no")
    options = [
        "--private",
        "--revision",
        "dev",
        "--message",
        "Try this",
        "--base-model",
        "me/base",
        "--license",
        "mit",
    ]
    assert main(["publish", str(folder), "me/tiny", *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    repo = hub.repo("me/tiny")
    assert printed[0].endswith(
        f" files to me/tiny: {hub.endpoint}/me/tiny/commit/{repo.commit('dev').oid}"
    )
    assert printed[1] == "not sent: secret.env"
    assert repo.private
    assert repo.commit("dev").title == "Try this"
    card = content(hub, "me/tiny", "dev")["README.md"].decode()
    assert "license: mit\n" in card
    assert "base_model: me/base\n" in card
    assert main(["publish", str(folder), "me/tiny", "--create-pr"]) == 0
    assert f"{hub.endpoint}/me/tiny/discussions/1" in capsys.readouterr().out
    assert main(["publish", str(folder), "you/tiny"]) == 1
    assert capsys.readouterr().err.startswith(
        "qvlm: error: you/tiny: the token's user may not make repositories for 'you'"
    )


def test_quantize_and_push(hub, api, source, processor, tmp_path, capsys, no_waiting):
    processor.save_pretrained(source)
    arguments = [
        "quantize",
        str(source),
        "--scheme",
        "W4A16",
        "--method",
        "rtn",
        "--push-to-hub",
        "me/tiny",
        "--private",
    ]
    hub.fail("POST", "/commit/", 500, times=None)
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "saved in out" in captured.out
    again = re.search(
        r"^qvlm: error: me/tiny: the Hub is out of order.* this publishes it: qvlm (.*)\n$",
        captured.err,
    )[1]
    hub.heal()
    assert main(again.split()) == 0
    assert hub.repo("me/tiny").private
    assert main([*arguments, "--output", str(tmp_path / "second")]) == 0
    assert "published" in capsys.readouterr().out


def test_quantize_asks_before_it_reads(hub, api, tmp_path, capsys):
    assert (
        main(
            ["quantize", "no-model", "--output", str(tmp_path / "out"), "--push-to-hub", "you/tiny"]
        )
        == 1
    )
    assert "may not make repositories for 'you'" in capsys.readouterr().err
    assert main(["quantize", "no-model", "--output", str(tmp_path / "out"), "--private"]) == 1
    assert (
        "--private is of the repository: name it with --push-to-hub REPO" in capsys.readouterr().err
    )


def test_no_token_in_any_output(hub, api, folder, no_waiting, capfd, caplog):
    hub.fail("POST", "/preupload/", 500, times=2)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert main(["publish", str(folder), "me/tiny", "--debug"]) == 0
    captured = capfd.readouterr()
    for text in (
        captured.out,
        captured.err,
        caplog.text,
        *(str(entry.message) for entry in warned),
    ):
        assert hub.token not in text
    for name, data in content(hub, "me/tiny").items():
        assert hub.token.encode() not in data, name
