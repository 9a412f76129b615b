"""What models.json says of a model, and what a create makes of it: slots, endpoint, deadlines, and what is refused."""

import copy
import json
from random import Random

import pytest
from jsonschema_rs import Draft202012Validator

from chalicelib import bootstrap, catalogue, jobs
from chalicelib.errors import SettingError
from tests.conftest import Bench, call

CREATE = "/api/queue/create"
OWN, LATER = "endpoint-of-flux", "endpoint-of-later"
SLOTS = {
    "prompt": {"type": "string", "maxLength": 40},
    "prompt_weight": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.1, "default": 0.5},
    "seed": {"type": "integer", "minimum": 10, "maximum": 1_000_000, "random": True},
    "steps": {"type": "integer", "minimum": 1, "maximum": 50, "default": 20},
    "sampler": {"type": "string", "enum": ["euler", "heun"], "default": "euler"},
    "tile": {"type": "boolean", "default": False},
    "label": {"type": "string", "minLength": 2, "maxLength": 8},
}
TEMPLATE = {
    "text": "{{prompt}}",
    "nodes": [{"seed": "{{seed}}", "steps": "{{steps}}"}, "{{sampler}} at {{prompt_weight}}, tiled: {{tile}}"],
    "label": "{{label}}",
    "{{steps}}": None,
}
FLUX = {"slots": SLOTS, "input": TEMPLATE}


@pytest.fixture
def endpoints():
    return (OWN, LATER)


@pytest.fixture
def bench(client, cloud, clock, faults, s3):
    return Bench(bootstrap.service(), cloud, clock, faults, s3)


@pytest.fixture
def place(client, monkeypatch, tmp_path):
    """Put another models.json in place, to be read by the next request."""

    def write(given):
        file = tmp_path / "models.json"
        file.write_text(json.dumps(given))
        monkeypatch.setattr(catalogue, "FILE", file)
        bootstrap.service.cache_clear()

    return write


@pytest.fixture
def known(place, bench):
    """Put these models in place, as by a deployment."""

    def deploy(models, **beside):
        place({**beside, "models": models})
        bench.service = bootstrap.service()

    return deploy


def create(client, model="flux", **body):
    return call(client, "POST", CREATE, {"model": model, **body})


def flux(client, prompt="a cat", *, label="cat", **slots):
    return create(client, prompt=prompt, slots={"label": label, **slots})


def written(table):
    return [row["n"] for row in table("SELECT (SELECT count(*) FROM jobs) + (SELECT count(*) FROM job_events) AS n")]


def asked(wire, operation):
    """The endpoints that were asked for it, in their order."""
    return [
        made.request.url.split("/v2/")[1].split("/")[0] for made in wire.calls if f"/{operation}" in made.request.url
    ]


# The file


def changed(change):
    """A good file with one thing changed: the way to it, and what stands there then."""
    given = {"unknown_models": "accept", "models": {"flux": {**copy.deepcopy(FLUX), "price_per_second": 0.001}}}
    *way, last = change[0]
    node = given
    for name in way:
        node = node.setdefault(name, {})
    node[last] = change[1]
    return given


FLUX_AT = ("models", "flux")
SLOT_AT = (*FLUX_AT, "slots")


@pytest.mark.parametrize(
    ("way", "value", "says"),
    [
        (("modles",), {}, "the file has a field 'modles'; there are unknown_models, models"),
        (("models",), [], "the file.models must be an object"),
        (("unknown_models",), "ignore", "the file.unknown_models must be accept or refuse"),
        (("models", " flux"), {}, "models. flux: a model's name"),
        (("models", "x" * 201), {}, f"models.{'x' * 201}: a model's name has 1 to 200"),
        (("models", "sdxl"), 7, "models.sdxl must be an object"),
        ((*FLUX_AT, "prize"), 1, "models.flux has a field 'prize'"),
        ((*FLUX_AT, "about"), 7, "models.flux.about must be text"),
        ((*FLUX_AT, "endpoint"), "a/b", "models.flux.endpoint must be the id"),
        ((*FLUX_AT, "usual_seconds"), 0, "models.flux.usual_seconds must be a number over 0"),
        ((*FLUX_AT, "price_per_second"), -0.1, "models.flux.price_per_second must be US dollars"),
        ((*FLUX_AT, "price_per_second"), "0.1", "models.flux.price_per_second must be US dollars"),
        ((*FLUX_AT, "price_per_second"), True, "models.flux.price_per_second must be US dollars"),
        ((*FLUX_AT, "price_per_second"), float("nan"), "models.flux.price_per_second must be US dollars"),
        ((*FLUX_AT, "deadlines"), 60, "models.flux.deadlines must be an object"),
        ((*FLUX_AT, "deadlines", "queue"), 60, "models.flux.deadlines has a field 'queue'"),
        ((*FLUX_AT, "deadlines", "start"), 59, "models.flux.deadlines.start must be a whole number of 60"),
        ((*FLUX_AT, "deadlines", "run"), 604_801, "models.flux.deadlines.run must be a whole number of 60"),
        ((*FLUX_AT, "deadlines", "total"), 90.5, "models.flux.deadlines.total must be a whole number of 60"),
        ((*FLUX_AT, "slots"), None, "models.flux.input has a slot 'label' that slots does not describe"),
        ((*FLUX_AT, "input"), None, "models.flux has slots, but no input"),
        ((*FLUX_AT, "input"), [], "models.flux.input must be an object"),
        ((*FLUX_AT, "input", "label"), "cat", "models.flux.slots.label stands nowhere in the input"),
        ((*FLUX_AT, "input", "label"), "{{ label }}", "models.flux.slots.label stands nowhere in the input"),
        ((*FLUX_AT, "input", "more"), "{{cfg}}", "models.flux.input has a slot 'cfg' that slots does not describe"),
        ((*SLOT_AT, "a-b"), {"type": "string"}, "models.flux.slots.a-b: a slot's name"),
        ((*SLOT_AT, "label"), 7, "models.flux.slots.label must be an object"),
        ((*SLOT_AT, "label"), {}, "models.flux.slots.label.type is missing"),
        ((*SLOT_AT, "label", "type"), "text", "models.flux.slots.label.type must be one of string"),
        ((*SLOT_AT, "label", "type"), ["string"], "models.flux.slots.label.type must be one of string"),
        ((*SLOT_AT, "label", "pattern"), "x", "models.flux.slots.label has a field 'pattern'"),
        ((*SLOT_AT, "label", "title"), 7, "models.flux.slots.label.title must be text"),
        ((*SLOT_AT, "label", "enum"), "x", "models.flux.slots.label.enum must be a list"),
        ((*SLOT_AT, "label", "enum"), [], "models.flux.slots.label.enum must be a list"),
        ((*SLOT_AT, "label", "minLength"), "2", "models.flux.slots.label.minLength must be a whole number"),
        ((*SLOT_AT, "label", "maxLength"), -1, "models.flux.slots.label.maxLength must be a whole number"),
        (
            (*SLOT_AT, "label", "contentMediaType"),
            "video/*",
            "models.flux.slots.label.contentMediaType must be image/*",
        ),
        ((*SLOT_AT, "steps", "minimum"), "1", "models.flux.slots.steps.minimum must be a number"),
        ((*SLOT_AT, "steps", "minimum"), 51, "models.flux.slots.steps: minimum must be no more than maximum"),
        ((*SLOT_AT, "steps", "multipleOf"), 0, "models.flux.slots.steps.multipleOf must be a number over 0"),
        ((*SLOT_AT, "steps", "random"), True, "models.flux.slots.steps: only an integer"),
        ((*SLOT_AT, "steps", "contentMediaType"), "image/*", "models.flux.slots.steps: a slot for a picture"),
        ((*SLOT_AT, "seed", "random"), "yes", "models.flux.slots.seed.random must be true or false"),
        ((*SLOT_AT, "seed", "maximum"), None, "models.flux.slots.seed: only an integer with minimum and maximum"),
        ((*SLOT_AT, "seed", "minimum"), 0.5, "models.flux.slots.seed: only an integer with minimum and maximum"),
        ((*SLOT_AT, "seed", "type"), "number", "models.flux.slots.seed: only an integer with minimum and maximum"),
        ((*SLOT_AT, "sampler", "contentMediaType"), "image/*", "models.flux.slots.sampler: a slot for a picture"),
        ((*SLOT_AT, "prompt", "contentMediaType"), "image/*", "models.flux.slots.prompt: a slot for a picture"),
        ((*SLOT_AT, "prompt", "type"), "integer", "models.flux.slots.prompt: it must be a string"),
        ((*SLOT_AT, "prompt", "maxLength"), 10_001, "models.flux.slots.prompt: it must be a string of at most 10000"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_with_its_place(tmp_path, way, value, says):
    file = tmp_path / "models.json"
    file.write_text(json.dumps(changed((way, value))))

    with pytest.raises(SettingError) as error:
        catalogue.load(file)

    assert error.value.code == "models_malformed"
    assert error.value.sentence.startswith(f"models.json is malformed: {says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"models": {"a": {}, "a": {}}}', "a name stands twice in one object"),
        ('{"models": ', "it cannot be read"),
        ("[" * 100_000, "it cannot be read"),
        ("[]", "the file must be an object"),
        (None, "it cannot be read"),
    ],
)
def test_a_file_that_is_none_is_malformed(tmp_path, text, says):
    if text is not None:
        (tmp_path / "models.json").write_text(text)

    with pytest.raises(SettingError, match=says) as error:
        catalogue.load(tmp_path / "models.json")

    assert error.value.code == "models_malformed"


def test_a_picture_must_stand_alone_in_its_text(tmp_path):
    slots = {"photo": {"type": "string", "contentMediaType": "image/*"}}
    file = tmp_path / "models.json"
    file.write_text(json.dumps({"models": {"edit": {"slots": slots, "input": {"url": "see {{photo}}"}}}}))

    with pytest.raises(SettingError, match=r"models\.edit\.slots\.photo: a picture must stand alone"):
        catalogue.load(file)


@pytest.mark.parametrize(
    ("slot", "default", "says"),
    [
        ("steps", 51, r"models\.flux: the default of slots\.steps must be smaller"),
        ("steps", "20", r"models\.flux: the default of slots\.steps must be integer"),
        ("sampler", "ddim", r"models\.flux: the default of slots\.sampler must be one of"),
        ("prompt", "x" * 41, r"models\.flux: the default of prompt must be shorter"),
    ],
)
def test_a_default_that_no_request_might_give_is_found(tmp_path, slot, default, says):
    file = tmp_path / "models.json"
    file.write_text(json.dumps(changed(((*SLOT_AT, slot, "default"), default))))

    with pytest.raises(SettingError, match=says) as error:
        catalogue.load(file).check()

    assert error.value.code == "models_malformed"


def test_the_file_that_ships_is_right():
    catalogue.load().check()


def test_while_the_file_is_malformed_no_job_is_made_and_the_answer_says_why(client, place, table):
    place({"models": {"flux": {"price_per_second": -1}}})

    status, answer, _ = create(client, prompt="a cat")

    assert (status, answer["code"]) == (500, "models_malformed")
    assert written(table) == [0]


# Slots


def test_what_runpod_gets_is_the_template_filled(client, known, cloud):
    known({"flux": FLUX})

    status, _, _ = flux(client, steps=30, seed=77, tile=True, prompt_weight=0.3)

    assert status == 200
    assert cloud.runpod.inputs() == [
        {
            "text": "a cat",
            "nodes": [{"seed": 77, "steps": 30}, "euler at 0.3, tiled: true"],
            "label": "cat",
            "{{steps}}": None,
        }
    ]


@pytest.mark.parametrize("left_out", [{}, {"steps": None}, {"steps": None, "sampler": None, "seed": None}])
def test_what_is_left_out_has_its_default(client, known, cloud, left_out):
    known({"flux": FLUX})

    assert flux(client, **left_out)[0] == 200

    (sent,) = cloud.runpod.inputs()
    assert sent["nodes"][0]["steps"] == 20
    assert sent["nodes"][1] == "euler at 0.5, tiled: false"


def test_a_whole_number_is_sent_whole_however_it_is_written(client, known, cloud):
    known({"flux": FLUX})

    call(client, "POST", CREATE, '{"model": "flux", "prompt": "a", "slots": {"label": "cat", "steps": 20.0}}')

    assert '"steps": 20}' in json.dumps(cloud.runpod.inputs())


REFUSED = [
    ({}, "slots.label is missing; flux needs it."),
    ({"label": None}, "slots.label is missing; flux needs it."),
    ({"label": "cat", "size": 1}, "slots.size is none of flux; there are: prompt_weight, seed, steps, sampler"),
    ({"label": "cat", "prompt": "a dog"}, "slots.prompt is none of flux"),
    ({"label": "cat", "steps": 51}, "slots.steps must be smaller than or equal to 50."),
    ({"label": "cat", "steps": 0}, "slots.steps must be bigger than or equal to 1."),
    ({"label": "cat", "steps": 20.5}, "slots.steps must be integer."),
    ({"label": "cat", "steps": "20"}, "slots.steps must be integer."),
    ({"label": "cat", "steps": True}, "slots.steps must be integer."),
    ({"label": "cat", "steps": [20]}, "slots.steps must be integer."),
    ({"label": "cat", "seed": 9}, "slots.seed must be bigger than or equal to 10."),
    ({"label": "cat", "prompt_weight": 0.35}, "slots.prompt_weight must be multiple of 0.1."),
    ({"label": "cat", "sampler": "ddim"}, "slots.sampler must be one of ['euler', 'heun']."),
    ({"label": "cat", "tile": 1}, "slots.tile must be boolean."),
    ({"label": "c"}, "slots.label must be longer than or equal to 2 characters."),
    ({"label": "c" * 9}, "slots.label must be shorter than or equal to 8 characters."),
    ({"label": 7}, "slots.label must be string."),
    ({"label": "a\0b"}, "A value in slots must not contain the NUL character."),
    (["cat"], "slots must be a JSON object"),
    ("cat", "slots must be a JSON object"),
]


@pytest.mark.parametrize(("slots", "says"), REFUSED)
def test_a_value_that_is_none_is_refused_and_nothing_is_written(client, known, cloud, table, slots, says):
    known({"flux": FLUX})

    status, answer, _ = create(client, prompt="a cat", slots=slots)

    assert (status, answer["code"]) == (400, "slots_invalid")
    assert answer["error"].startswith(says)
    assert (written(table), cloud.runpod.inputs()) == ([0], [])


def test_in_a_list_the_job_is_named_too(client, known, table):
    known({"flux": FLUX})
    good, bad = ({"model": "flux", "prompt": "a cat", "slots": {"label": label}} for label in ("cat", "c"))

    _, answer, _ = call(client, "POST", CREATE, {"jobs": [good, bad]})

    assert (answer["code"], written(table)) == ("slots_invalid", [0])
    assert answer["error"] == "jobs[1]: slots.label must be longer than or equal to 2 characters."


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        (None, "prompt_required"),
        ("", "prompt_required"),
        (" \n", "prompt_required"),
        (7, "prompt_invalid"),
        ("x" * 41, "slots_invalid"),
    ],
)
def test_the_prompt_is_looked_at_like_a_slot(client, known, table, prompt, code):
    known({"flux": FLUX})

    status, answer, _ = flux(client, prompt)

    assert (status, answer["code"], written(table)) == (400, code, [0])
    assert answer["error"].startswith("prompt ")


@pytest.mark.parametrize(
    ("prompt", "sent"), [(None, "a default cat"), ("a dog", "a dog"), ("", 400), (0, 400), (False, 400), ([], 400)]
)
def test_a_prompt_with_a_default_may_be_left_out_and_nothing_else(client, known, cloud, prompt, sent):
    slots = {**SLOTS, "prompt": {"type": "string", "default": "a default cat"}}
    known({"flux": {"slots": slots, "input": TEMPLATE}})

    status, _, _ = flux(client, prompt)

    assert ([made["text"] for made in cloud.runpod.inputs()] or status) == ([sent] if isinstance(sent, str) else sent)


@pytest.mark.parametrize("words", ["{{seed}}", "{{label}}, {{prompt}}", "{{image_url}}", "{{prompt}}", '"}}, "a": {{'])
def test_a_prompt_that_looks_like_a_slot_is_sent_as_those_very_words(client, known, cloud, words):
    known({"flux": FLUX})

    assert flux(client, words, label="{{seed}}")[0] == 200

    (sent,) = cloud.runpod.inputs()
    assert (sent["text"], sent["label"]) == (words, "{{seed}}")


def test_a_seed_is_drawn_within_its_bounds():
    model = catalogue.load().get("qwen-image-edit")
    slots = {**model.slots, "seed": {**model.slots["seed"], "minimum": 3, "maximum": 5}}
    small = type(model)(name="small", slots=slots, template=model.template)
    values = model.read("snow", {})

    drawn = {small.fill(values, Random(number))["workflow"]["3"]["inputs"]["seed"] for number in range(100)}

    assert drawn == {3, 4, 5}


def test_a_seed_is_kept_over_a_retry(client, known, bench, cloud, table):
    known({"flux": FLUX})
    job_id = flux(client)[1]["id"]
    before = table("SELECT input FROM jobs")
    call(client, "POST", f"/api/jobs/{job_id}/cancel")

    assert call(client, "POST", f"/api/jobs/{job_id}/retry")[0] == 200
    bench.round()

    first, second = cloud.runpod.inputs()
    assert first == second
    assert 10 <= first["nodes"][0]["seed"] <= 1_000_000
    assert table("SELECT input FROM jobs") == before


@pytest.mark.parametrize("model", ["flux", "sdxl", "unheard-of"])
@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"slots": {"steps": 2}}, "slots_invalid"),
        ({"slots": "x"}, "slots_invalid"),
        ({"image_key": "uploads/2026/01/31/0000"}, "images_invalid"),
        ({"image_url": "https://pictures.example/a.png"}, "images_invalid"),
    ],
)
def test_what_fills_a_template_is_refused_where_there_is_none(client, known, table, model, given, code):
    known({"flux": FLUX, "sdxl": {}})
    own = {"input": {"text": "mine"}} if model == "flux" else {"prompt": "a cat"}

    status, answer, _ = create(client, model, **own, **given)

    assert (status, answer["code"], written(table)) == (400, code, [0])
    assert "for models that have a template" in answer["error"]


def test_an_own_input_is_sent_unchanged_for_a_model_with_a_template_too(client, known, cloud):
    known({"flux": FLUX})
    own = {"workflow": {"1": {"text": "{{prompt}} {{seed}}"}}, "steps": 900}

    assert create(client, input=own, slots={})[0] == 200

    assert cloud.runpod.inputs() == [own]


def test_what_a_model_says_later_changes_no_job_that_is_there(client, known, bench, cloud, faults):
    known({"flux": FLUX})
    faults.add(r"POST .*/run$", (429, ""))
    flux(client, seed=11)

    known({"flux": {"slots": {"prompt": SLOTS["prompt"]}, "input": {"words": "{{prompt}}"}}})
    bench.round(after=120)

    assert [sent["nodes"][0]["seed"] for sent in cloud.runpod.inputs()] == [11]


# Which endpoint


def test_a_job_goes_to_its_models_endpoint_and_is_asked_for_and_cancelled_there(client, known, bench, wire):
    known({"flux": {"endpoint": OWN}})
    job_id = create(client, input={"simulate": {"run_seconds": 900}})[1]["id"]

    known({"flux": {"endpoint": LATER}})
    bench.round()
    call(client, "POST", f"/api/jobs/{job_id}/cancel")
    assert bench.job(job_id).status == "cancelled"
    assert asked(wire, "run") == [OWN]
    assert set(asked(wire, "status") + asked(wire, "cancel")) == {OWN}

    call(client, "POST", f"/api/jobs/{job_id}/retry")
    bench.round()
    bench.round()
    assert asked(wire, "run") == [OWN, LATER]
    assert asked(wire, "status")[-1] == LATER


@pytest.mark.parametrize("way", ["at once", "in a round", "by hand", "low"])
def test_however_it_is_sent_it_is_to_that_endpoint(client, known, bench, wire, faults, way):
    known({"flux": {"endpoint": OWN}, "sdxl": {}})
    if way in ("in a round", "by hand"):
        faults.add(r"POST .*/run$", (429, ""), times=3)
    priority = {"priority": "low"} if way == "low" else {}
    ids = [create(client, model, prompt="a cat", **priority)[1]["id"] for model in ("flux", "sdxl", "unheard-of")]
    refused = len(asked(wire, "run"))

    if way == "by hand":
        for job_id in ids:
            assert call(client, "POST", "/dev/runpod", {"jobId": job_id})[0] == 200
    bench.round(after=120)

    sent = asked(wire, "run")[0 if way == "at once" else refused :]
    assert sorted(sent) == sorted([OWN, "local-endpoint", "local-endpoint"])
    assert [bench.job(job_id).endpoint_id for job_id in ids] == [OWN, "local-endpoint", "local-endpoint"]


def test_a_row_of_the_earlier_version_without_a_model_goes_to_that_of_the_default_one(known, bench, wire, table):
    known({jobs.DEFAULT_MODEL: {"endpoint": OWN}})
    table("INSERT INTO jobs (id, status, prompt, model) VALUES ('old', 'queued', 'a cat', NULL)")

    bench.round()

    assert asked(wire, "run") == [OWN]


def test_a_model_that_is_not_known_is_refused_where_the_file_says_so(client, known, table):
    known({"flux": FLUX, "sdxl": {}}, unknown_models="refuse")

    status, answer, _ = create(client, "flx", prompt="a cat")

    assert (status, answer["code"]) == (400, "model_unknown")
    assert answer["error"] == "There is no model 'flx' here; there are flux, sdxl."
    assert written(table) == [0]
    assert create(client, "sdxl", prompt="a cat")[0] == 200


# Deadlines


TIMES = {"start": 120, "run": 60, "total": 600}


def test_a_models_deadlines_are_what_runpod_is_told(client, known, wire):
    known({"flux": {"deadlines": TIMES}, "sdxl": {}})
    for model in ("flux", "sdxl"):
        create(client, model, prompt="a cat")

    told = [json.loads(made.request.body)["policy"] for made in wire.calls if made.request.url.endswith("/run")]

    assert told[0] == {"executionTimeout": 60_000, "ttl": (120 + 60 + 600) * 1000}
    assert told[1]["executionTimeout"] != 60_000


@pytest.mark.parametrize(
    ("deadlines", "simulated", "code", "says"),
    [
        (TIMES, {"queue_seconds": 900}, "start_deadline", "2 minutes"),
        (TIMES, {"run_seconds": 900}, "run_deadline", "1 minutes"),
        ({"total": 120}, {"queue_seconds": 900}, "total_deadline", "in all"),
    ],
)
def test_they_end_a_job_instead_of_the_settings(client, known, bench, deadlines, simulated, code, says):
    known({"flux": {"deadlines": deadlines}, "sdxl": {}})
    ids = [create(client, model, input={"simulate": simulated})[1]["id"] for model in ("flux", "sdxl")]

    bench.round(after=2)
    bench.round(after=121)

    ended, other = (bench.job(job_id) for job_id in ids)
    assert (ended.status, ended.error_code) == ("error", code)
    assert says in ended.error_message
    assert other.status == "running"


@pytest.mark.parametrize(
    ("body", "seconds"),
    [({}, 600), ({"deadline": 90}, 90), ({"deadline": 3600}, 3600), ({"model": "sdxl"}, 86_400)],
)
def test_a_jobs_own_deadline_goes_before_its_models_and_that_before_the_settings(client, known, bench, body, seconds):
    known({"flux": {"deadlines": TIMES}, "sdxl": {}})
    job_id = create(client, **{"prompt": "a cat", **body})[1]["id"]

    def given():
        job = bench.job(job_id)
        return (jobs.from_text(job.deadline_at) - bench.clock.now()).total_seconds()

    assert given() == seconds
    call(client, "POST", f"/api/jobs/{job_id}/cancel")
    bench.clock.advance(50)
    call(client, "POST", f"/api/jobs/{job_id}/retry")
    assert given() == seconds


# What can be drawn with


def listed(client):
    status, answer, headers = call(client, "GET", "/api/models")
    assert status == 200
    return {model["model"]: model for model in answer["models"]}, answer, headers


def test_the_models_are_listed_as_the_file_has_them(client, known):
    described = {"about": "Fast.", "usual_seconds": 4, "price_per_second": 0.0004, "deadlines": {"run": 60}}
    known({"flux": {**FLUX, **described}, "sdxl": {}}, unknown_models="refuse")

    models, answer, _ = listed(client)

    assert (answer["default_model"], answer["unknown_models"]) == ("qwen-image", "refuse")
    assert list(models) == ["flux", "sdxl"]
    assert models["flux"]["deadlines"] == {"start": None, "run": 60, "total": None}
    assert [models["flux"][name] for name in ("about", "usual_seconds", "price_per_second", "pictures")] == [
        "Fast.", 4, 0.0004, 0,
    ]  # fmt: skip
    assert models["flux"]["slots"]["required"] == ["prompt", "label"]
    assert models["sdxl"]["slots"]["required"] == ["prompt"]
    assert "endpoint" not in json.dumps(answer)


def test_a_model_that_takes_pictures_says_how_many(client):
    models, _, _ = listed(client)

    assert [(name, model["pictures"]) for name, model in models.items()] == [("qwen-image", 0), ("qwen-image-edit", 1)]
    assert models["qwen-image-edit"]["slots"]["required"] == ["prompt", "image_url"]


def test_the_list_is_not_sent_twice_and_costs_no_call(client, cloud):
    before = cloud.calls.total()
    _, _, headers = listed(client)

    again = call(client, "GET", "/api/models", headers={"If-None-Match": headers["ETag"]})

    assert (again[0], again[1]) == (304, None)
    assert cloud.calls.total() == before


ACCEPTED = [
    {"label": "cat"},
    {"label": "cats & ca"[:8], "steps": 1},
    {"label": "cat", "steps": 50, "sampler": "heun"},
    {"label": "cat", "steps": 20.0, "tile": True},
    {"label": "cat", "seed": 10, "prompt_weight": 0.7},
    {"label": "cat", "prompt_weight": 1},
    {"label": "แมว"},
]


def can_be_said_in_a_schema(slots):
    """NUL is refused in all texts, null counts as left out, and the prompt has a field of its own."""
    return isinstance(slots, dict) and "prompt" not in slots and slots.get("label") not in (None, "a\0b")


PROMPTS = ["a cat", "x" * 40, "x" * 41, "", " \n", "\u2003", "\x1f", "a\0b", 7, [], "แมว"]


@pytest.mark.parametrize(
    ("prompt", "slots"),
    [
        *[("a cat", slots) for slots in ACCEPTED],
        *[("a cat", slots) for slots, _ in REFUSED if can_be_said_in_a_schema(slots)],
        *[(prompt, {"label": "cat"}) for prompt in PROMPTS],
    ],
)
def test_the_schema_of_a_model_accepts_what_a_create_accepts(client, known, prompt, slots):
    known({"flux": FLUX})
    described = Draft202012Validator(listed(client)[0]["flux"]["slots"])

    status, answer, _ = create(client, prompt=prompt, slots=slots)

    assert described.is_valid({"prompt": prompt, **slots}) == (status == 200), answer


@pytest.mark.parametrize("prompt", ["x" * 10_000, "x" * 10_001, *PROMPTS])
def test_the_schema_of_a_model_without_a_template_is_that_of_a_prompt(client, known, prompt):
    known({"sdxl": {}})
    described = Draft202012Validator(listed(client)[0]["sdxl"]["slots"])

    status, answer, _ = create(client, "sdxl", prompt=prompt)

    assert described.is_valid({"prompt": prompt}) == (status == 200), answer
