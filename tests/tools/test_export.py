"""A run for others: what pipelines and vLLM read, what the cards say, and an upload to a hub.

The hub is a server on this machine.
"""

import ast
import base64
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from html import unescape
from http.server import BaseHTTPRequestHandler
from urllib.request import urlopen

import mistune
import pytest
import torch
import yaml
from huggingface_hub import DatasetCard, ModelCard, constants
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor

import vflan
from tests.conftest import make_squares, serve
from vflan.config import Recipe, read_json, write_json
from vflan.tools.cards import dataset_card, lineage, model_card
from vflan.tools.export import also_for_transformers_4, serve_command
from vflan.training.run import Run


@pytest.fixture(scope="module")
def runs(backbones, tmp_path_factory):
    """A projector run, and a LoRA run from it: three steps each."""
    home = tmp_path_factory.mktemp("share")
    samples = make_squares(home)
    values = dict(
        samples=str(samples),
        images=str(samples.parent / "images"),
        runs=str(home / "runs"),
        **backbones,
    )
    values |= dict(lr=1e-2, global_batch=8, micro_batch=4, max_steps=3, max_length=256)
    projector = vflan.train(Recipe(name="projector", stage="projector", template="plain", **values))
    lora = dict(tune=("projector", "language_model"), lora_r=4, lora_alpha=32)
    base = vflan.train(Recipe(name="base", stage="base", **lora, **values), init=projector)
    return projector, base


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    return runs[1].export(tmp_path_factory.mktemp("out") / "mine")


def test_the_code_of_the_card_answers_as_vflan_does(runs, exported, monkeypatch):
    monkeypatch.chdir(exported.parent)
    Image.new("RGB", (30, 20), "red").save("picture.png")
    (code,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code.replace("print(", "answer = ("), names)
    base = runs[1]
    sample = {"text": "What is in the picture?", "image": "picture.png"}
    (ours,) = vflan.answer(base.load_model(), base.processor(), [sample], max_new_tokens=128)
    assert names["answer"].strip() == ours and ours


def test_the_folder_has_all_that_vllm_reads_for_llava(exported, backbones):
    """vLLM takes classes and the projector's size from config.json, and finds weights by name."""
    config = json.loads((exported / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (
        ["LlavaForConditionalGeneration"],
        "llava",
    )
    vision, text = config["vision_config"], config["text_config"]
    assert (vision["model_type"], text["model_type"]) == ("clip_vision_model", "llama")
    assert text["architectures"] == ["LlamaForCausalLM"]
    assert (
        config["vision_feature_layer"] == -2
        and config["vision_feature_select_strategy"] == "default"
    )
    assert config["projector_hidden_act"] == "gelu" and config["multimodal_projector_bias"] is True

    with safe_open(exported / "model.safetensors", "pt") as stored:
        shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}
    tower, language = "vision_tower.vision_model", "language_model.model"
    names = {
        f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    names |= {
        f"{tower}.embeddings.{name}" for name in ("class_embedding", "patch_embedding.weight")
    }
    names |= {f"{tower}.embeddings.position_embedding.weight", "language_model.lm_head.weight"}
    names |= {
        f"{tower}.{norm}.{kind}"
        for norm in ("pre_layrnorm", "post_layernorm")
        for kind in ("weight", "bias")
    }
    for i in range(vision["num_hidden_layers"]):
        layers = [f"self_attn.{p}_proj" for p in "qkv"] + [
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
            "layer_norm1",
            "layer_norm2",
        ]
        names |= {
            f"{tower}.encoder.layers.{i}.{layer}.{kind}"
            for layer in layers
            for kind in ("weight", "bias")
        }
    for i in range(text["num_hidden_layers"]):
        layers = [f"self_attn.{p}_proj" for p in "qkvo"] + [
            f"mlp.{p}_proj" for p in ("gate", "up", "down")
        ]
        layers += ["input_layernorm", "post_attention_layernorm"]
        names |= {f"{language}.layers.{i}.{layer}.weight" for layer in layers}
    assert set(shapes) == names | {f"{language}.embed_tokens.weight", f"{language}.norm.weight"}
    assert shapes["multi_modal_projector.linear_1.weight"] == [
        text["hidden_size"],
        vision["hidden_size"],
    ]
    assert shapes[f"{language}.embed_tokens.weight"][0] == text["vocab_size"]

    pictures = json.loads((exported / "preprocessor_config.json").read_text())
    assert pictures["crop_size"] == {"height": vision["image_size"], "width": vision["image_size"]}
    assert (
        pictures["image_processor_type"].startswith("LlavaImageProcessor")
        and len(pictures["image_mean"]) == 3
    )
    processor = json.loads((exported / "processor_config.json").read_text())
    assert (
        processor["processor_class"] == "LlavaProcessor"
        and processor["patch_size"] == vision["patch_size"]
    )
    assert processor["num_additional_image_tokens"] == 1 and processor["image_token"] == "<image>"
    tokens = json.loads((exported / "tokenizer.json").read_text())["added_tokens"]
    assert [t["id"] for t in tokens if t["content"] == "<image>"] == [config["image_token_index"]]
    template = (exported / "chat_template.jinja").read_text()
    assert re.search(
        r"for \w+ in m\.content if \w+\.type == 'image'", template
    )  # the format that is called openai


def test_the_exported_values_keep_vllms_rules_for_llava(exported):
    """The rules that vLLM checks when it loads and when it counts a picture's tokens.

    They are those of vllm/model_executor/models/llava.py and clip.py, in vLLM's repository at
    030ea52effcb05071543c8c42b8f0145e94cee43 (clip.py) and 0004c540861d3e59a7c1b3860f594aa8b24293db.
    vLLM itself needs a GPU, and was not run.
    """
    config, processor = (
        AutoConfig.from_pretrained(exported),
        AutoProcessor.from_pretrained(exported),
    )
    vision, text = config.vision_config, config.text_config
    # CLIPVisionEmbeddings, CLIPAttention
    assert vision.image_size % vision.patch_size == 0
    assert vision.hidden_size % vision.num_attention_heads == 0
    # _get_num_hidden_layers: the layer that is read exists
    assert 0 < vision.num_hidden_layers + config.vision_feature_layer + 1
    # VocabParallelEmbedding; the picture's token is a row of it
    assert config.image_token_index < text.vocab_size
    # get_num_image_tokens, of the strategy `default`: the patches, without the class token
    tokens = (vision.image_size // vision.patch_size) ** 2
    assert tokens < text.max_position_embeddings
    content = [{"type": "image"}, {"type": "text", "text": "What color?"}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    # PromptReplacement: its target, one token, stands once in the prompt of one picture
    assert processor.tokenizer(prompt).input_ids.count(config.image_token_index) == 1
    picture = Image.new("RGB", (30, 20), "red")
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    assert (inputs["input_ids"] == config.image_token_index).sum() == tokens
    # LlavaImagePixelInputs
    assert inputs["pixel_values"].shape == (1, 3, vision.image_size, vision.image_size)


def test_the_vllm_command_is_printed_and_fits_the_model(runs, tmp_path, capsys):
    folder = runs[1].export(tmp_path / "with space")
    line = capsys.readouterr().out.strip()
    command = shlex.split(line)
    assert command[:3] == ["vllm", "serve", str(folder)] and line == serve_command(folder)
    options = dict(zip(command[3::2], command[4::2]))
    assert (
        int(options["--max-model-len"])
        <= json.loads((folder / "config.json").read_text())["text_config"][
            "max_position_embeddings"
        ]
    )
    assert json.loads(options["--limit-mm-per-prompt"]) == {"image": 1}


def test_an_adapter_on_its_base_model_equals_the_merged_model(
    runs, exported, tmp_path, monkeypatch
):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    projector, base = runs
    folder = base.export(tmp_path / "adapter", merge=False)
    about = json.loads((folder / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(projector.folder / "model")
    assert not list(folder.glob("model*.safetensors"))
    begun = AutoModelForImageTextToText.from_pretrained(projector.folder / "model")
    together = PeftModel.from_pretrained(begun, folder).eval()
    merged = AutoModelForImageTextToText.from_pretrained(exported).eval()
    picture = Image.new("RGB", (30, 20), "red")
    inputs = base.processor()(
        images=picture, text="USER: <image> What color? ASSISTANT:", return_tensors="pt"
    )
    with torch.no_grad():
        ours, theirs = together(**inputs).logits, merged(**inputs).logits
        bare = projector.load_model()(**inputs).logits
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(bare, theirs, atol=1e-3)


def test_an_adapter_trained_from_a_projector_file_belongs_on_bare_backbones(runs, tmp_path, capsys):
    folder = shutil.copytree(runs[1].folder, tmp_path / "base")
    record = dict(init="data/mm_projector.bin", init_weights=dict(projector="1f"))
    write_json(folder / "init.json", record)
    out = Run(folder).export(tmp_path / "adapter", merge=False)
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] is None
    said = "it belongs on its bare backbones with the projector of data/mm_projector.bin."
    assert said in capsys.readouterr().out


def test_a_failed_export_leaves_nothing_and_can_be_repeated(runs, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("vflan.tools.export.model_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs[1].export(tmp_path / "mine")
    assert not list(tmp_path.iterdir())
    (tmp_path / ".mine.part").mkdir()
    (tmp_path / ".mine.part" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="did not mark it as its own"):
        runs[1].export(tmp_path / "mine")
    assert (tmp_path / ".mine.part" / "thesis.txt").read_text() == "mine"
    (tmp_path / ".mine.part" / "thesis.txt").unlink()
    (tmp_path / ".mine.part" / ".vflan").touch()  # of one that was killed
    (tmp_path / ".mine.part" / "model.safetensors").write_bytes(b"half")
    assert runs[1].export(tmp_path / "mine").is_dir() and [
        path.name for path in tmp_path.iterdir()
    ] == ["mine"]


def test_a_run_that_cannot_be_exported_raises_the_reason(runs, exported, tmp_path):
    projector, base = runs
    with pytest.raises(ValueError, match="projector has no adapter: it was not tuned with LoRA"):
        projector.export(tmp_path / "a", merge=False)
    with pytest.raises(FileExistsError, match="not empty"):
        base.export(exported)
    shutil.copytree(projector.folder, tmp_path / "lost", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(ValueError, match="missing: the model is damaged"):
        Run(tmp_path / "lost").export(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="not finished"):
        Run(tmp_path).export(tmp_path / "b")


# ------------------------------------------------------- other versions, and servers


def other_python(variable, package):
    """The Python of another environment; the test is skipped where the variable names none."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python that has {package} (see CONTRIBUTING.md)")
    return python


@pytest.fixture(scope="module")
def asked(runs, tmp_path_factory):
    """20 questions with pictures of different colours and shapes, and our greedy answers."""
    folder, questions = tmp_path_factory.mktemp("asked"), []
    for i in range(20):
        path = folder / f"{i}.png"
        Image.new("RGB", (20 + 3 * i, 50 - i), (12 * i, 255 - 9 * i, 37 * i % 256)).save(path)
        text = ("What is in the picture?", "What color is it?", "Describe  the image.")[i % 3]
        questions.append(dict(text=text, image=str(path)))
    base = runs[1]
    ours = vflan.answer(base.load_model(), base.processor(), questions, max_new_tokens=12)
    assert len(set(ours)) > 3
    return questions, ours


IN_OTHER_VERSION = """
import json, sys
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
processor, answers = AutoProcessor.from_pretrained(sys.argv[1]), []
for question in json.loads(sys.argv[2]):
    content = [{"type": "image"}, {"type": "text", "text": question["text"]}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    picture = Image.open(question["image"])
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    answers.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
print(json.dumps([transformers.__version__, answers]))
"""


def test_transformers_4_gives_the_same_answers(exported, asked):
    """Measured with transformers 4.57: see CONTRIBUTING.md for the second environment."""
    python = other_python("VFLAN_TEST_TRANSFORMERS_4", "transformers 4")
    questions, ours = asked
    command = [python, "-c", IN_OTHER_VERSION, str(exported), json.dumps(questions)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=exported.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    version, theirs = json.loads(done.stdout.splitlines()[-1])
    assert version.startswith("4.") and theirs == ours


def test_the_exported_settings_have_the_names_that_transformers_4_knows(runs, exported, tmp_path):
    """Version 4 has no class TokenizersBackend, takes a dict here, and reads no rope_parameters."""
    adapter = runs[1].export(tmp_path / "adapter", merge=False)
    for folder in (exported, adapter):
        about = json.loads((folder / "tokenizer_config.json").read_text())
        assert about["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert about["model_input_names"] == ["input_ids", "attention_mask"]
        assert about["extra_special_tokens"] == {"image_token": "<image>"}
    text = json.loads((exported / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (10000.0, None)
    processor = AutoProcessor.from_pretrained(exported)  # and 5 reads the same
    ours = runs[1].processor()
    assert processor.tokenizer.image_token == "<image>"
    line = "USER: <image>\nWhat  color? ASSISTANT: red</s>"
    assert processor.tokenizer(line).input_ids == ours.tokenizer(line).input_ids


def test_a_scaled_rotary_embedding_has_the_name_of_transformers_4(exported, tmp_path):
    """Vicuna's 16k models scale it; version 4 would silently read them without."""
    config = json.loads((exported / "config.json").read_text())
    scaled = dict(rope_type="linear", factor=4.0)
    config["text_config"]["rope_parameters"] = scaled | dict(rope_theta=5e5)
    write_json(tmp_path / "config.json", config)
    shutil.copy(exported / "tokenizer_config.json", tmp_path)
    also_for_transformers_4(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (5e5, scaled)
    again = AutoConfig.from_pretrained(tmp_path).text_config.rope_parameters
    assert (again["rope_theta"], again["factor"], again["rope_type"]) == (5e5, 4.0, "linear")


@pytest.fixture
def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def test_a_server_on_the_cpu_gives_the_same_answers(exported, asked, free_port, monkeypatch):
    """`transformers serve` speaks OpenAI's protocol and needs no GPU."""
    python = other_python("VFLAN_TEST_SERVING", "transformers[serving]")
    code = "from transformers.cli.transformers import main; main()"
    command = [python, "-c", code, "serve", str(exported), "--device", "cpu"]
    server = subprocess.Popen([*command, "--port", str(free_port)], stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{free_port}/health", server)
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{free_port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        questions, ours = asked
        served = vflan.ServedModel(str(exported), workers=2)
        theirs = dict(served.answering(questions, 12))
    finally:
        server.terminate()
        server.wait(30)
    assert [theirs[i].reason for i in range(20)] == [""] * 20
    assert [theirs[i].text.strip() for i in range(20)] == ours


def wait_for(address, process, seconds=120):
    """Until a server answers; AssertionError if it ends or takes longer."""
    for _ in range(2 * seconds):
        assert process.poll() is None, "the server ended"
        with suppress(OSError), urlopen(address, timeout=5) as reply:
            return reply.status
        time.sleep(0.5)
    raise AssertionError(f"no answer from {address} in {seconds} s")


# ------------------------------------------------------------------------- the cards


def stored_run(folder, name, init=None, mixture=None, scores=None, **recipe):
    """The files that a finished run keeps, without a model."""
    folder = folder / name
    folder.mkdir(parents=True)
    values = dict(
        vision_tower="openai/clip-vit-large-patch14-336",
        language_model="lmsys/vicuna-7b-v1.5",
        images="i",
        runs="runs",
    )
    values |= dict(samples="data/vision_flan/annotation_191-task_1k.json")
    write_json(folder / "recipe.json", Recipe(name=name, stage="base", **values | recipe).to_dict())
    write_json(folder / "init.json", dict(init=init and str(init)))
    write_json(folder / "done.json", dict(steps=3, rows=30, first_loss=4.0, last_loss=1.25))
    if mixture:
        files = [dict(file=recipe.get("samples", values["samples"]), rows=sum(mixture.values()))]
        write_json(
            folder / "mixture.json",
            dict(rows=sum(mixture.values()), files=files, tasks=mixture, order="abc"),
        )
    if scores:
        head = "run,benchmark,metric,value,low,high,n,seed,baseline,judge,problems\n"
        (folder / "scores.csv").write_text(head + "".join(f"{line}\n" for line in scores))
    return Run(folder)


def test_the_card_has_base_models_data_licences_recipe_and_scores_of_all_stages(tmp_path):
    first = stored_run(
        tmp_path,
        "projector",
        samples="data/llava_pretrain/blip_laion_cc_sbu_558k.json",
        mixture={"": 100},
    )
    tasks = {
        "CLEVR_CoGenT+Question_Answering": 20,
        "VQA_color": 7,
        "fairface+image_classification_race": 3,
    }
    scores = [
        "base,pope,f1,81.25,79,83,100,0,50,,0",
        "base,llava_bench,score,70,60,80,9,0,,rule judge,0",
        "base,pope,yes_ratio,50,40,60,100,0,50,,0",
        "other,mme,score,9,8,10,9,0,5,,0",
    ]
    base = stored_run(tmp_path, "base", first.folder, tasks, scores, lr=0.125)
    assert lineage(base.folder) == [first.folder, base.folder]
    card = model_card(base, "mine")
    about = ModelCard(card.content).data.to_dict()
    assert about["base_model"] == ["openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"]
    assert about["datasets"] == ["liuhaotian/LLaVA-Pretrain", "Vision-Flan/vision-flan_191-task_1k"]
    assert (about["license"], about["pipeline_tag"]) == ("other", "image-text-to-text")
    result, judged = about["model-index"][0]["results"]
    assert judged["dataset"]["type"] == "llava_bench" and "|  | 9 | rule judge |" in card.text
    assert result["dataset"]["type"] == "pope" and result["metrics"] == [
        {"type": "f1", "value": 81.25}
    ]
    assert (
        "| pope | f1 | 81.2 | 79.0 to 83.0 | 50.0 | 100 |" in card.text
        and "yes_ratio" not in card.text
    )
    assert "| lr | 0.125 |" in card.text and "Llama 2 Community License" in card.text
    assert "| base | base | 30 | 3 | 3 | projector | 0.125 |" in card.text
    assert "| projector | base | 30 |  | 3 | projector |" in card.text  # captions have no tasks
    assert "none of its own" in card.text and "LAION" in card.text
    assert (
        "| CC-BY-4.0 | 2 | 23 | CLEVR_CoGenT, fairface |" in card.text
        and "| not stated |" in card.text
    )
    assert "Faces or identities are the subject of 1 of the tasks." in card.text
    data = dataset_card(base)
    assert DatasetCard(data.content).data.to_dict()["size_categories"] == "n<1K"
    assert (
        "| CLEVR_CoGenT+Question_Answering | 20 | CLEVR_CoGenT | CC-BY-4.0 |" in data.text
        and "(hash of the order: abc)" in data.text
    )


def test_the_data_card_of_any_number_of_rows_has_the_hubs_size_class(tmp_path):
    many = {999: "n<1K", 1000: "1K<n<10K", 10**7: "10M<n<100M", 10**8: "100M<n<1B"}
    for rows, size in many.items():
        card = dataset_card(stored_run(tmp_path, f"{rows}", mixture={"": rows}))
        assert card.data.size_categories == size


def test_the_card_of_the_mini_world_says_what_the_model_knows_and_that_it_has_no_scores(tmp_path):
    tiny = dict(vision_tower="data/tiny/vision_tower", language_model="data/tiny/language_model")
    run = stored_run(
        tmp_path, "base", samples="data/tiny/samples/flan.json", mixture={"color_of": 5}, **tiny
    )
    card = model_card(run, "mine")
    about = card.data.to_dict()
    assert about["license"] == "apache-2.0" and not {"base_model", "datasets", "model-index"} & set(
        about
    )
    assert "drawn shapes" in card.text and "It was not evaluated." in card.text
    frozen = stored_run(tmp_path, "frozen", samples="data/frozen/samples/flan.json", **tiny)
    card = model_card(frozen, "mine")
    assert card.data.license == "apache-2.0" and "drawn shapes" in card.text
    more = stored_run(
        tmp_path,
        "mixed",
        samples="data/tiny/samples/flan.json",
        more_samples=("mine.json#5",),
        **tiny,
    )
    assert (
        model_card(more, "mine").data.license == "other"
        and "were not recorded" in model_card(more, "mine").text
    )


def test_cards_hold_no_path_of_this_machine_and_no_foreign_markup(tmp_path):
    evil = "a | b\n<script>alert(1)</script>"
    run = stored_run(
        tmp_path,
        "base",
        tmp_path / "mm_projector.bin",
        {evil: 4},
        samples=str(tmp_path / "mine.json"),
    )
    for card in (model_card(run, "mine"), dataset_card(run)):
        assert (
            str(tmp_path) not in card.content
            and "<script>" not in card.content
            and "mine.json" in card.content
        )
    assert "| a \\| b &lt;script&gt;alert(1)&lt;/script&gt; | 4 |" in dataset_card(run).text


def test_no_foreign_name_in_a_card_is_markup_code_or_yaml(tmp_path):
    """Names of tasks, files, runs, judges and folders; the card's own links are all that it has."""
    evil = "![x](https://evil.org/x.png) <b> `c` **d**\n# head"
    tiny = dict(vision_tower="data/tiny/vision_tower", language_model="data/tiny/language_model")
    samples = "![f](g.png): - {h} `c`.json"
    rows = ['"![r](s.png): `t`",pope,f1,81.25,79,83,100,0,50,"[judge](https://evil.org)",0']
    name = '![n](o.png) `", x=1, y="'
    first = tmp_path / "![init](p.png) `q`"
    run = stored_run(tmp_path, "base", first, {evil: 4}, rows, samples=samples, **tiny)
    run = Run(run.folder.rename(tmp_path / "![r](s.png): `t`"))
    write_json(
        run.folder / "mixture.json", read_json(run.folder / "mixture.json") | dict(order=evil)
    )
    own = {"https://arxiv.org/abs/2402.11690", "data/README.md"}
    for card in (model_card(run, name), dataset_card(run)):
        html = mistune.create_markdown(escape=False, plugins=["table", "url"])(card.text)
        assert set(re.findall(r'href="([^"]*)"', html)) <= own
        assert not re.search("<img|<b>|<strong|head</h", html)
        assert html.count("<h1") == 1 and "![f](g.png): - {h} `c`.json" in unescape(html)
    (code,) = re.findall(r"```python\n(.*?)```", model_card(run, name).text, re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    (call,) = (call for call in calls if ast.unparse(call.func) == "pipeline")
    assert {k.arg: ast.literal_eval(k.value) for k in call.keywords} == {"model": name}
    front = yaml.safe_load(model_card(run, name).content.split("---")[1])
    assert front["model-index"][0]["name"] == name
    assert DatasetCard(dataset_card(run).content).data.pretty_name.endswith(run.name)


def test_an_exported_run_has_both_cards(runs, exported):
    assert ModelCard.load(exported / "README.md").data.library_name == "transformers"
    assert "32 rows" in DatasetCard.load(exported / "data" / "README.md").text
    for file in exported.rglob("*.json"):
        assert str(runs[1].folder.parent.parent) not in file.read_text()


# --------------------------------------------------------------------------- the hub


class Hub:
    """Stands in for the hub and takes commits: create, preupload, LFS in one piece, commit."""

    def __init__(self):
        self.files, self.blobs, self.requests, self.refuse = {}, {}, [], None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                status, answer = (
                    (hub.refuse, {})
                    if hub.refuse
                    else hub.answer(self, self.path.split("?")[0], body)
                )
                answer = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_GET = do_POST

        self.server, self.endpoint = serve(Handler)

    def answer(self, request, path, body):
        self.requests.append((path, request.headers.get("Authorization"), body))
        if path == "/api/repos/create":
            return 200, {"url": f"{self.endpoint}/me/mine"}
        if path == "/api/validate-yaml":
            return 200, {}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    dict(path=n, uploadMode=mode[n.endswith(".safetensors")], shouldIgnore=False)
                    for n in names
                ]
            }
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {
                "objects": [
                    each | dict(actions={"upload": {"href": f"{self.endpoint}/lfs/{each['oid']}"}})
                    for each in objects
                ]
            }
        if path.startswith("/lfs/"):
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    self.files[value["path"]] = self.blobs[value["oid"]]
            return 200, {"commitUrl": f"{self.endpoint}/me/mine/commit/1", "commitOid": "1" * 40}
        return 404, {}


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_a_pushed_run_equals_the_exported_folder(runs, exported, hub, capsys):
    page = runs[1].push("me/mine")
    assert page.startswith(hub.endpoint) and "vllm serve me/mine" in capsys.readouterr().out
    ours = {
        str(p.relative_to(exported)): p.read_bytes() for p in exported.rglob("*") if p.is_file()
    }
    assert b'model="me/mine"' in hub.files["README.md"] and b'model="mine"' in ours["README.md"]
    assert set(hub.files) == set(ours) and all(
        hub.files[name] == ours[name] for name in set(ours) - {"README.md"}
    )
    create = next(json.loads(body) for path, _, body in hub.requests if path == "/api/repos/create")
    assert create["name"] == "mine" and "private" in (
        create.get("visibility"),
        create.get("private") and "private",
    )
    signed = {path: token for path, token, _ in hub.requests if not path.startswith("/lfs/")}
    assert set(signed.values()) == {"Bearer hf_of_this_test"}
    assert not any(b"hf_of_this_test" in data for data in hub.files.values())
    assert not list(runs[1].folder.glob(".push-*"))  # no scratch folder is left


def test_a_failed_push_raises_one_sentence(runs, hub, monkeypatch):
    run = runs[1]
    with pytest.raises(ValueError, match="user/name"):
        run.push("mine")
    hub.refuse = 403
    with pytest.raises(PermissionError, match="does not let this token write to me/mine"):
        run.push("me/mine")
    hub.refuse = 400
    with pytest.raises(ConnectionError, match="push again"):
        run.push("me/mine")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        run.push("me/mine")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("vflan.tools.export.get_token", lambda: None)
    with pytest.raises(PermissionError, match="HF_TOKEN"):
        run.push("me/mine")
    assert not list(run.folder.glob(".push-*"))
