"""The gallery page as its visitors have it: in a browser, before a whole ./run."""

import base64
import contextlib
import functools
import io
import json
import re
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

import pytest
import requests
from PIL import Image

from chalicelib import page as served
from tests.running import Running, free_port
from tools.cloud import Account

FILES = Path(__file__).parents[1] / "files"
NO_ANSWER = r"Failed to load resource"  # of the browser itself, where a request is refused or has no answer
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "\"><script>alert('prompt')</script>",
    "{{constructor.constructor('alert(1)')()}} ${alert(1)} {prompt} {n}",
    "javascript:alert(1)",
    "\u202egnp.exe\u202c \u0000\ufffe".replace("\u0000", ""),
    "x" * 4_000,
]


def word():
    """One that no other job has."""
    return f"w{uuid.uuid4().hex[:10]}"


def create(stack, prompt, *, simulate=None, **fields):
    """The id of a job whose run is quick, but for what it is told."""
    wish = {"queue_seconds": 0, "run_seconds": 0.3, **(simulate or {})}
    answer = stack.call(
        "POST", "/api/queue/create", json={"input": {"prompt": prompt, "simulate": wish}, "prompt": prompt, **fields}
    )
    assert answer["ok"], answer
    return answer["id"]


def ended(stack, job_id):
    """The job when it has ended; rounds are run by hand meanwhile, for the next one may be far."""
    for _ in range(60):
        job = stack.call("GET", f"/api/jobs/{job_id}")["job"]
        if job["status"] in ("done", "error", "cancelled"):
            return job
        time.sleep(0.25)
        stack.call("POST", "/dev/runpod-poll")
    raise AssertionError(job)


def listed(stack, text):
    return stack.call("GET", "/api/jobs", params={"q": text})["jobs"]


def cancel_all(stack, text):
    """The jobs of a test that still wait: each round would go on asking for every one of them."""
    cursor = None
    while True:
        answer = stack.call(
            "POST", "/api/jobs/bulk", json={"do": "cancel", "filter": {"q": text}, "limit": 100, "cursor": cursor}
        )
        assert answer["ok"], answer
        cursor = answer["next_cursor"]
        if cursor is None:
            return


def hold(stack, held):
    """Have no worker take a run, or have them again."""
    account = Account()
    answer = requests.post(
        f"http://127.0.0.1:{stack.cloud_port}/v2/{account.endpoint_id}/simulate/health",
        headers={"Authorization": f"Bearer {account.runpod_api_key}"},
        json={"workers": {"idle": 0} if held else None, "hold": held},
        timeout=10,
    )
    assert answer.ok, answer.text


def card(page, text):
    return page.locator(".card", has_text=text)


def shown(image):
    """Wait until a picture has been loaded, and say how wide it is."""
    image.wait_for()
    return image.evaluate("async (image) => { await image.decode(); return image.naturalWidth; }")


def look(page):
    """Let the page, whose clock stands, look at the list once more, as it does while a job is live."""
    with page.expect_response("**/api/jobs?*"):
        page.clock.run_for(3_100)
    page.wait_for_timeout(200)  # for what it does with the answer


def look_again(page):
    """Let the page look at once; by itself it does now and then."""
    page.evaluate("dispatchEvent(new PopStateEvent('popstate'))")


def scroll(page, cards):
    """Scroll down until there are so many cards."""
    for _ in range(200):
        if page.locator(".card").count() >= cards:
            break
        page.mouse.wheel(0, 9_000)
        page.wait_for_timeout(100)
    assert page.locator(".card").count() == cards


def until(page, selector):
    page.locator(selector).first.wait_for(state="attached")


def d1(stack, sql, *params):
    """Change the table behind the service's back."""
    account = Account()
    path = f"accounts/{account.account_id}/d1/database/{account.database_id}/query"
    answer = requests.post(
        f"http://127.0.0.1:{stack.cloud_port}/client/v4/{path}",
        headers={"Authorization": f"Bearer {account.api_token}"},
        json={"sql": sql, "params": params},
        timeout=10,
    ).json()
    assert answer["success"], answer
    stack.call("POST", "/dev/runpod-poll")  # after which the service reads anew


def bury(stack, prompt):
    """A job whose picture is drawn and waits at RunPod, and could not be stored."""
    job_id = create(stack, prompt)
    assert ended(stack, job_id)["status"] == "done"
    d1(
        stack,
        "UPDATE jobs SET status = 'error', result_url = NULL, result_r2_key = NULL, outputs = NULL, "
        "version = version + 1, error_code = 'r2_unreachable', error_message = 'R2 did not answer.', "
        "dead_at = updated_at, result_until = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '+20 minutes') WHERE id = ?1",
        job_id,
    )
    return job_id


def picture(width=900, height=600):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, "JPEG")
    return {"name": "garden <b>.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()}


def violations(page):
    """What axe-core finds that is serious, in light and in dark, as rule and element."""
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    found = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        # All rules are asked; of those that hold nothing is told, which would take as long again.
        found += page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
    return [
        (rule["id"], node["html"][:200], node.get("failureSummary"))
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


@contextlib.contextmanager
def serving(handler):
    """The handler behind a port of its own; yields its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# Making


def test_a_job_is_made_watched_and_its_picture_seen(visit, stack):
    page, prompt = visit(), f"แมวส้ม an orange cat {word()}"
    hold(stack, True)  # else a busy machine may show it when it is done

    page.fill("#prompt", prompt)
    page.click("#send")

    made = card(page, prompt)
    made.locator(".frame.live .stage").wait_for()
    assert made.locator("progress").count() == 1
    hold(stack, False)
    assert shown(made.locator("img")) == 512
    assert made.locator(".badge").inner_text().split() == ["✓", "Done"]
    assert page.input_value("#prompt") == ""


def test_a_double_click_makes_one_job(visit, stack):
    page, prompt = visit(), word()
    until(page, "#model option")
    page.fill("#prompt", prompt)

    page.dblclick("#send")

    card(page, prompt).wait_for()
    assert len(listed(stack, prompt)) == 1


@pytest.mark.parametrize("lost", ["all of it", "its body", "all of it, and the page is loaded anew"])
def test_what_got_no_answer_is_sent_again_as_the_same_request(visit, stack, lost):
    page, prompt = visit(expected=[NO_ANSWER]), word()
    until(page, "#model option")
    keys = []

    def lose(route):
        keys.append(route.request.headers["idempotency-key"])
        route.fetch()  # the service hears it, and its answer is lost
        if lost == "its body":
            route.fulfill(status=200, body="")
        else:
            route.abort()

    page.route("**/api/queue/create", lose, times=1)
    page.fill("#prompt", prompt)
    page.click("#send")
    page.locator("#refused", has_text=re.compile("unreachable|no_answer")).wait_for()
    if lost.endswith("anew"):
        page.reload()
        until(page, "#model option")
    assert page.input_value("#prompt") == prompt

    with page.expect_request("**/api/queue/create") as again:
        page.click("#send")

    keys.append(again.value.headers["idempotency-key"])
    page.locator("#said", has_text="That was made already").wait_for()
    card(page, prompt).locator(".badge.running, .badge.done").wait_for()
    assert (len(listed(stack, prompt)), len(set(keys))) == (1, 1)
    page.click("#send")
    page.locator("#said", has_text="It is queued.").wait_for()
    assert len(listed(stack, prompt)) == 2


def test_a_key_that_is_refused_says_nothing_of_what_was_sent_before(visit, stack):
    page, prompt, tries = visit(expected=[NO_ANSWER]), word(), []
    until(page, "#model option")

    def answer(route):
        tries.append(route.request.headers["idempotency-key"])
        if len(tries) == 1:
            route.fetch()
            route.abort()
        elif len(tries) == 2:
            route.fulfill(status=403, json={"ok": False, "error": "This key may not.", "code": "forbidden"})
        else:
            route.continue_()

    page.route("**/api/queue/create", answer)
    page.fill("#prompt", prompt)
    for text in ("unreachable", "forbidden"):
        page.click("#send")
        page.locator("#refused", has_text=text).wait_for()

    page.click("#send")

    page.locator("#said", has_text="That was made already").wait_for()
    assert (len(listed(stack, prompt)), len(set(tries))) == (1, 1)


def test_the_same_prompt_once_more_is_a_job_of_its_own(visit, stack):
    page, prompt = visit(), word()
    until(page, "#model option")

    for times in (1, 2):
        page.fill("#prompt", prompt)
        page.keyboard.press("Control+Enter")
        page.wait_for_function("(n) => document.querySelectorAll('.card .badge').length >= n", arg=times)
        page.wait_for_function("() => document.getElementById('prompt').value === ''")

    assert len(listed(stack, prompt)) == 2


def test_what_the_service_refuses_is_told_and_nothing_is_lost(visit):
    page = visit(expected=[NO_ANSWER])
    page.select_option("#model", "qwen-image-edit")
    page.fill("#prompt", "make it snow")

    page.click("#send")

    assert "images_invalid" in page.locator("#refused:not(:empty)").inner_text()
    assert page.input_value("#prompt") == "make it snow"


def test_a_picture_is_uploaded_edited_and_compared(visit, stack):
    page, prompt = visit(), f"make it snow {word()}"
    page.select_option("#model", "qwen-image-edit")
    page.set_input_files("#choose", picture())
    page.wait_for_function("() => document.querySelector('#chosen progress')?.value === 1")
    assert "garden <b>.jpg" in page.locator("#chosen").inner_text()
    page.locator("#values summary").click()
    page.get_by_label("Steps").fill("7")
    page.fill("#prompt", prompt)
    page.click("#send")
    done = card(page, prompt)
    done.locator(".badge.done").wait_for()

    done.locator("a").click()
    page.click("text=Before and after")

    assert shown(page.locator(".before img")) == 900
    page.locator(".slider").fill("20")
    assert page.locator(".large").evaluate("(frame) => frame.style.getPropertyValue('--cut')") == "20%"
    page.click("text=Raw input")
    given = json.loads(page.locator("details:has-text('Raw input') pre").inner_text())
    (id_,) = [job["id"] for job in listed(stack, prompt)]
    assert given["workflow"]["3"]["inputs"]["steps"] == 7
    assert given == stack.call("GET", f"/api/jobs/{id_}?include=input")["job"]["input"]


def test_what_is_sent_is_as_it_was_then_wherever_the_visitor_goes_meanwhile(visit, stack):
    page, prompt, uploads = visit(), f"make it snow {word()}", []
    page.route(lambda url: "/uploads/" in url and "X-Amz-Signature" in url, lambda route: uploads.append(route))
    page.select_option("#model", "qwen-image-edit")
    page.set_input_files("#choose", picture())
    page.fill("#prompt", prompt)
    page.click("#send")
    page.fill("#prompt", "what comes next")
    page.click("text=Figures")
    page.locator("#figures .tile").first.wait_for()

    uploads[0].continue_()

    page.locator("#said", has_text="It is queued.").wait_for()
    assert len(listed(stack, prompt)) == 1
    page.click("text=Gallery")
    assert page.input_value("#prompt") == "what comes next"
    page.reload()
    until(page, "#model option")
    assert page.input_value("#prompt") == "what comes next"


def test_an_upload_that_failed_is_tried_once_more_by_make(visit, stack):
    page, prompt = visit(expected=[NO_ANSWER]), f"make it snow {word()}"
    page.route(lambda url: "/uploads/" in url and "X-Amz-Signature" in url, lambda route: route.abort(), times=2)
    page.select_option("#model", "qwen-image-edit")
    page.set_input_files("#choose", picture())
    page.locator("#chosen .wrong", has_text="garden <b>.jpg: The picture could not be uploaded.").wait_for()
    page.fill("#prompt", prompt)
    page.click("#send")
    page.locator("#refused", has_text="upload_failed").wait_for()

    page.click("#send")

    card(page, prompt).wait_for()


def test_a_picture_that_lay_there_too_long_is_uploaded_anew(visit, stack):
    page, prompt, asked = visit(expected=[NO_ANSWER]), f"make it snow {word()}", []
    gone = {"ok": False, "error": "There is no uploaded picture.", "code": "image_not_found"}

    def refuse(route):
        asked.append(route.request.post_data_json["image_key"])
        if len(asked) == 1:
            route.fulfill(status=400, json=gone)
        else:
            route.continue_()

    page.route("**/api/queue/create", refuse)
    page.select_option("#model", "qwen-image-edit")
    page.set_input_files("#choose", picture())
    page.fill("#prompt", prompt)

    page.click("#send")

    card(page, prompt).wait_for()
    assert len(asked) == 2
    assert asked[0] != asked[1]


def test_what_was_chosen_for_a_model_is_there_again_with_it(visit):
    page = visit()
    page.select_option("#model", "qwen-image-edit")
    page.set_input_files("#choose", picture())
    page.locator("#values summary").click()
    page.get_by_label("Steps").fill("7")

    page.select_option("#model", "qwen-image")
    assert page.locator("#pictures").is_hidden()
    page.select_option("#model", "qwen-image-edit")

    assert page.locator("#chosen li").count() == 1
    assert page.locator("#slots label", has_text="Steps").locator("input").input_value() == "7"


def test_a_value_out_of_its_bounds_is_shown_where_it_was_closed(visit):
    page = visit()
    page.select_option("#model", "qwen-image-edit")
    page.locator("#values summary").click()
    page.get_by_label("Steps").fill("500000")
    page.locator("#values summary").click()
    page.fill("#prompt", "make it snow")

    page.click("#send")

    page.locator("#values[open]").wait_for()
    assert page.evaluate("document.activeElement.validity.rangeOverflow")


def test_a_job_of_a_model_that_is_not_listed_is_used_again_with_that_model(visit, stack):
    job_id = create(stack, word(), model="my-own")
    page, held = visit("?view=figures"), []
    until(page, ".tile")
    page.route("**/api/models", lambda route: held.append(route))
    page.goto(f"{stack.url}/?job={job_id}")

    page.click("#job button:has-text('Use it again')")  # before it is known what models there are
    page.wait_for_function("() => document.getElementById('prompt').value !== ''")
    for route in held:
        route.continue_()

    page.wait_for_function("() => document.getElementById('model').value === 'my-own'")
    page.locator("#model-filter option", has_text="my-own").wait_for(state="attached")
    assert len(held) == 1
    assert page.input_value("#model") == "my-own"


def test_only_listed_models_are_offered_where_others_are_refused(visit):
    page = visit("?view=figures")

    def refuse_others(route):
        answer = route.fetch().json()
        models = [model for model in answer["models"] if model["model"] != answer["default_model"]]
        route.fulfill(json={**answer, "models": models, "unknown_models": "refuse"})

    page.route("**/api/models", refuse_others)
    page.goto(page.url.partition("?")[0])

    until(page, "#model option")
    assert page.locator("#model option").all_inner_texts() == ["qwen-image-edit"]


def test_a_job_that_the_filter_may_hide_is_told(visit):
    page = visit("?status=error")
    page.fill("#prompt", word())

    page.click("#send")

    page.locator("#said", has_text="The filter may hide it.").wait_for()


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_a_picture_may_be_dropped_and_pasted(visit, how):
    page = visit()
    page.select_option("#model", "qwen-image-edit")
    until(page, ".drop")
    data = base64.b64encode(picture()["buffer"]).decode()

    page.evaluate(
        """([how, data]) => {
          const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
          const held = new DataTransfer();
          held.items.add(new File([bytes], "a.jpg", { type: "image/jpeg" }));
          const event = how === "drop" ? new DragEvent("drop", { dataTransfer: held, bubbles: true, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: held, bubbles: true });
          document.body.dispatchEvent(event);
        }""",
        [how, data],
    )

    page.wait_for_function("() => document.querySelector('#chosen progress')?.value === 1")


# The list


def test_filters_stand_in_the_address_and_the_back_button_works(visit, stack):
    text = word()
    done, failed = (
        create(stack, f"{text} one"),
        create(stack, f"{text} two", simulate={"status": "FAILED"}),
    )
    assert (ended(stack, done)["status"], ended(stack, failed)["status"]) == ("done", "error")
    page = visit()
    until(page, ".badge")

    page.fill("#q", text)
    page.wait_for_url(f"**/?q={text}")
    page.wait_for_function("() => document.querySelectorAll('.card .badge').length === 2")
    assert page.locator("#q").evaluate("(field) => field === document.activeElement")
    counts = page.locator("#tabs a").all_inner_texts()
    assert counts == ["All2", "Queued0", "Running0", "Done1", "Failed1", "Cancelled0"]
    page.click("#tabs a:has-text('Failed')")
    card(page, f"{text} two").wait_for()
    assert card(page, f"{text} one").count() == 0
    assert "status=error" in page.url

    page.go_back()
    card(page, f"{text} one").wait_for()
    shared = visit(f"?status=done&q={text}&model=qwen-image")
    until(shared, ".badge")
    assert shared.locator(".card .prompt").all_inner_texts() == [f"{text} one"]
    assert (shared.input_value("#q"), shared.input_value("#model-filter")) == (text, "qwen-image")


def test_what_fits_no_job_says_so_and_leads_back(visit):
    page = visit(f"?q={word()}")

    page.locator("#empty", has_text="No job fits.").wait_for()
    page.click("#empty a")

    until(page, ".card .badge")
    assert "q=" not in page.url


def test_many_jobs_come_page_by_page_each_once_in_their_order(visit, stack):
    text = word()
    jobs = [{"prompt": f"{text} {n}", "input": {"prompt": "", "simulate": {"queue_seconds": 900}}} for n in range(100)]
    for _ in range(2):
        assert stack.call("POST", "/api/queue/create", json={"jobs": jobs})["ok"]
    page = visit(f"?q={text}")
    until(page, ".card .badge")
    assert page.locator(".card .badge").count() <= 100

    scroll(page, 200)

    prompts = page.locator(".card .prompt").all_inner_texts()
    first = stack.call("GET", "/api/jobs", params={"q": text, "limit": 100})
    second = stack.call("GET", "/api/jobs", params={"q": text, "limit": 100, "cursor": first["next_cursor"]})
    assert prompts == [job["prompt"] for job in first["jobs"] + second["jobs"]]
    assert page.locator("#more").is_hidden()
    # What is in view is looked at, however far down that is.
    last = second["jobs"][-1]
    stack.call("POST", f"/api/jobs/{last['id']}/cancel", json={})
    card(page, last["prompt"]).last.locator(".badge.cancelled").wait_for()
    cancel_all(stack, text)


def test_more_jobs_than_one_answer_has_come_meanwhile_and_none_is_left_out(visit, stack):
    text = word()
    quiet = {"queue_seconds": 900}
    create(stack, f"{text} before", simulate=quiet)
    page = visit(f"?q={text}", expected=[NO_ANSWER, "ERR_INTERNET_DISCONNECTED"], own=True)
    card(page, "before").wait_for()
    page.context.set_offline(True)
    jobs = [{"prompt": f"{text} {n}", "input": {"prompt": "", "simulate": quiet}} for n in range(100)]
    for _ in range(2):
        assert stack.call("POST", "/api/queue/create", json={"jobs": jobs})["ok"]
    page.context.set_offline(False)

    look_again(page)

    page.wait_for_function("() => document.querySelectorAll('.card .badge').length > 40")
    scroll(page, 201)
    assert page.locator(".card .prompt").all_inner_texts()[-1] == f"{text} before"
    cancel_all(stack, text)


def test_a_job_made_here_stands_where_the_service_says_whatever_the_clock_here(visit, stack):
    text = word()
    create(stack, f"{text} earlier")
    page = visit("?view=figures")
    page.add_init_script("const real = Date.now; Date.now = () => real() - 600_000")
    page.route("**/api/**", lambda route: route.fulfill(response=(answer := route.fetch()), headers=undated(answer)))
    page.goto(stack.url)
    until(page, ".card .badge")
    page.fill("#prompt", f"{text} now")

    page.click("#send")

    page.locator(".card:first-child", has_text=f"{text} now").wait_for()


def undated(answer):
    return {name: value for name, value in answer.headers.items() if name != "date"}


def test_a_picture_that_did_not_come_is_asked_for_again(visit, stack):
    prompt = word()
    job = ended(stack, create(stack, prompt))
    page = visit("?view=figures", expected=[NO_ANSWER], own=True)
    page.clock.install()
    page.route(job["result_url"], lambda route: route.abort(), times=1)
    page.goto(f"{stack.url}/?q={prompt}")
    card(page, prompt).locator(".unshown").wait_for()

    page.clock.run_for(5_100)

    assert shown(card(page, prompt).locator("img")) == 512


def test_a_picture_begins_anew_only_where_it_failed_and_then_by_its_newest_link(visit, stack):
    """A private bucket's links differ from answer to answer, and end."""
    prompt, asked = word(), []
    job = ended(stack, create(stack, prompt))
    create(stack, f"{prompt} goes on", simulate={"queue_seconds": 900})
    page = visit("?view=figures", expected=[NO_ANSWER], own=True)
    page.clock.install()

    def sign(route):
        answer = route.fetch().json()
        for each in answer["jobs"]:
            for file in each["outputs"]:
                file["url"] += f"?signed={uuid.uuid4()}"
        route.fulfill(json=answer)

    page.route("**/api/jobs?*", sign)
    page.route(re.compile(re.escape(job["result_url"])), lambda route: asked.append(route))  # and waits
    page.goto(f"{stack.url}/?q={prompt}")
    until(page, ".card img")
    for _ in range(3):
        look(page)
    assert len(asked) == 1

    asked[0].fulfill(status=403)
    card(page, prompt).locator(".unshown").wait_for()
    with page.expect_request(re.compile(re.escape(job["result_url"]))) as again:
        page.clock.run_for(5_100)

    assert again.value.url != asked[0].request.url
    cancel_all(stack, prompt)


def test_one_request_a_look_serves_all_cards_and_says_nothing_where_nothing_changed(visit, stack):
    text = word()
    ids = [create(stack, f"{text} {n}", simulate={"queue_seconds": 900}) for n in range(3)]
    page = visit("?view=figures", own=True)
    page.clock.install()
    page.goto(f"{stack.url}/?q={text}")
    page.wait_for_function("() => document.querySelectorAll('.card .badge.running').length === 3")
    look(page)  # its first looks, which the visit of the figures did not have
    asked = []
    page.on("response", lambda response: "/api/" in response.url and asked.append(response))

    for _ in range(3):
        look(page)

    assert len(asked) == 3
    assert {response.url.partition("?")[0] for response in asked} == {f"{stack.url}/api/jobs"}
    assert 304 in {response.status for response in asked} <= {200, 304}
    for job_id in ids:
        stack.call("POST", f"/api/jobs/{job_id}/cancel", json={})


@pytest.mark.parametrize(("hidden", "seconds"), [(False, 15), (True, 60)])
def test_it_looks_seldom_while_nothing_runs_or_nobody_sees_it(visit, stack, hidden, seconds):
    text = word()
    job_id = create(stack, text, simulate={"queue_seconds": 900} if hidden else None)
    if not hidden:
        ended(stack, job_id)
    page = visit("?view=figures", own=True)
    page.clock.install()
    if hidden:
        page.add_init_script("Object.defineProperty(document, 'hidden', { get: () => true })")
    page.goto(f"{stack.url}/?q={text}")
    until(page, ".card .badge")
    page.wait_for_timeout(500)
    asked = []
    page.on("request", lambda request: "/api/jobs" in request.url and asked.append(request.url))

    page.clock.run_for((seconds - 2) * 1000)
    page.wait_for_timeout(200)
    early = len(asked)
    with page.expect_request("**/api/jobs?*"):
        page.clock.run_for(3_000)
    page.wait_for_timeout(300)  # in which no second one may come

    assert (early, len(asked)) == (0, 1)
    cancel_all(stack, text)


def test_a_list_without_an_answer_keeps_no_job_from_being_opened(visit, stack):
    prompt = word()
    job_id = create(stack, prompt)
    ended(stack, job_id)
    page = visit(f"?q={prompt}")
    until(page, ".card .badge")
    page.route("**/api/jobs?*", lambda route: None)
    look_again(page)

    card(page, prompt).locator("a").click()

    page.locator("#job dl").wait_for(timeout=12_000)  # less than the page waits for the list


# One job


def test_the_arrows_go_on_where_the_list_was_not_loaded_and_the_keyboard_stays_there(visit, stack):
    text = word()
    jobs = [{"prompt": f"{text} {n}", "input": {"prompt": "", "simulate": {"queue_seconds": 900}}} for n in range(60)]
    assert stack.call("POST", "/api/queue/create", json={"jobs": jobs})["ok"]
    ids = [job["id"] for job in stack.call("GET", "/api/jobs", params={"q": text, "limit": 60})["jobs"]]
    page = visit(f"?q={text}&job={ids[47]}")
    page.locator("#job button[aria-label='The older job']:not([aria-disabled])").wait_for()

    page.keyboard.press("ArrowRight")
    page.wait_for_function("(id) => location.search.includes(id)", arg=ids[48])
    page.keyboard.press("Shift+ArrowRight")
    page.locator("#job dl").wait_for()
    page.keyboard.press("Escape")

    page.wait_for_function("() => !document.querySelector('#job').open")
    assert ids[48] in page.evaluate("document.activeElement.href")
    cancel_all(stack, text)


def test_what_has_the_focus_or_is_marked_stays_though_the_job_goes_on(visit, stack):
    prompt = f"{word()} marked"
    job_id = create(stack, prompt, simulate={"queue_seconds": 900})
    page = visit(f"?job={job_id}")
    page.locator("#job .state", has_text="waits for a GPU").wait_for()
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#job .words'))")
    page.click("#job summary:has-text('Timeline')")
    page.locator("#job summary:has-text('Timeline')").focus()
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#job .words'))")

    stack.call("POST", f"/api/jobs/{job_id}/cancel", json={})
    stack.call("POST", "/dev/runpod-poll")

    # RunPod takes 95 cancels in ten seconds, and those of other tests may come first.
    page.locator("#job .badge.cancelled").wait_for(timeout=60_000)
    assert page.evaluate("getSelection().toString()") == prompt
    assert page.evaluate("document.activeElement.textContent") == "Timeline"
    assert page.locator("#job details[open] .timeline li", has_text="cancelled").count() == 1
    page.click("#job button:has-text('Delete')")
    stack.call("POST", f"/api/jobs/{job_id}/retry", json={})
    look_again(page)
    page.locator("#job .badge.queued, #job .badge.running").wait_for()
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.querySelector('#job').contains(document.activeElement)")
    stack.call("POST", f"/api/jobs/{job_id}/cancel", json={})


def test_that_a_job_is_not_to_be_had_is_told_once(visit):
    page = visit("?view=figures", expected=[NO_ANSWER], own=True)
    page.clock.install()
    asked = []
    page.on("request", lambda request: "/api/jobs/nothing" in request.url and asked.append(request.url))
    page.goto(f"{page.url.partition('?')[0]}?job=nothing")
    page.locator("#job", has_text="job_not_found").wait_for()
    page.locator("#job button[aria-label='Close']").focus()

    for _ in range(4):
        page.clock.run_for(3_100)
        page.wait_for_timeout(100)

    assert len(asked) <= 2
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Close"


def test_a_waiting_job_says_why_and_is_cancelled(visit, stack):
    prompt = word()
    job_id = create(stack, prompt, simulate={"queue_seconds": 900})
    page = visit(f"?job={job_id}")
    page.locator("#job .state", has_text="waits for a GPU").wait_for()
    assert "RunPod" in page.locator("#job .state").inner_text()

    page.click("#job button:has-text('Cancel')")
    page.click(".ask button:has-text('Back')")
    assert stack.call("GET", f"/api/jobs/{job_id}")["job"]["status"] != "cancelled"
    page.click("#job button:has-text('Cancel')")
    page.click(".ask button.main")

    page.locator("#job .badge.cancelled").wait_for()
    assert stack.call("GET", f"/api/jobs/{job_id}")["job"]["status"] == "cancelled"
    page.keyboard.press("Escape")
    card(page, prompt).locator(".badge.cancelled").wait_for()


def test_a_failed_job_says_why_and_what_to_do_and_is_retried(visit, stack):
    job_id = create(stack, word(), simulate={"status": "FAILED", "error": "CUDA out of memory"})
    assert ended(stack, job_id)["status"] == "error"
    page = visit(f"?job={job_id}")
    said = page.locator("#job .state.bad")
    said.wait_for()
    assert "CUDA out of memory" in said.inner_text()
    assert "worker_failed" in said.inner_text()
    assert "What to do:" in said.inner_text()

    page.click("#job button:has-text('Retry')")
    assert "new paid run" in page.locator(".ask").inner_text()
    with page.expect_response("**/retry"):
        page.click(".ask button.main")

    assert ended(stack, job_id)["attempt"] == 2
    look_again(page)
    page.locator("#job tbody tr").nth(1).wait_for()


def test_a_job_is_deleted_and_gone(visit, stack):
    prompt = word()
    job_id = create(stack, prompt)
    ended(stack, job_id)
    page = visit(f"?q={prompt}", expected=[NO_ANSWER])
    card(page, prompt).locator("a").click()

    page.click("#job button:has-text('Delete')")
    page.click(".ask button.bad")

    card(page, prompt).wait_for(state="detached")
    page.locator("#empty").wait_for()
    assert page.locator("#job[open]").count() == 0
    assert stack.call("GET", f"/api/jobs/{job_id}")["code"] == "job_deleted"
    page.goto(f"{stack.url}/?job={job_id}")
    page.locator("#job", has_text="job_deleted").wait_for()


def test_every_file_is_there_a_video_plays_and_a_download_has_a_name(visit, stack):
    video = base64.b64encode((FILES / "red.webm").read_bytes()).decode()
    image = base64.b64encode(picture()["buffer"]).decode()
    prompt = f"Ein Garten, ถ่ายจากฟ้า/{word()}"
    simulate = {
        "run_seconds": 0.3,
        "queue_seconds": 0,
        "output": {"images": [image], "video": f"data:video/webm;base64,{video}"},
    }
    job_id = create(stack, prompt, simulate=simulate)
    assert len(ended(stack, job_id)["outputs"]) == 2
    page = visit(f"?job={job_id}")
    page.locator(".strip button").nth(1).click()

    width = page.locator(".large video").evaluate(
        "async (video) => { video.muted = true; await video.play(); return video.videoWidth; }"
    )
    assert width > 0
    page.locator(".strip button").nth(0).click()
    assert shown(page.locator(".large img")) == 900
    with page.expect_download() as download:
        page.click("#job button:has-text('Download')")
    slug = re.sub("[ ,/]+", "-", prompt)
    assert download.value.suggested_filename == f"{slug}-{job_id[:8]}-1.jpg"
    page.click("text=Copy prompt")
    page.locator("#said", has_text="Copied.").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == prompt
    page.click("text=Full size")
    assert page.locator(".large.zoomed img").evaluate("(image) => image.clientWidth") == 900


def test_the_keyboard_does_it_all(visit, stack):
    text = word()
    ids = [create(stack, f"{text} {n}") for n in range(3)]
    for job_id in ids:
        ended(stack, job_id)
    page = visit(f"?q={text}")
    page.wait_for_function("() => document.querySelectorAll('.card .badge').length === 3")
    page.locator(".card a").nth(1).focus()

    page.keyboard.press("Enter")
    page.locator("#job .badge").wait_for()
    assert f"job={ids[1]}" in page.url
    page.keyboard.press("ArrowRight")
    page.wait_for_function("(id) => location.search.includes(id)", arg=ids[0])
    page.locator("#job .facts, #job dl").wait_for()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("(id) => location.search.includes(id)", arg=ids[2])
    page.keyboard.press("ArrowLeft")  # there is no newer one
    page.keyboard.press("Escape")

    page.wait_for_function("() => !document.querySelector('#job').open && !location.search.includes('job=')")
    assert page.evaluate("document.activeElement.closest('.card') !== null")
    page.go_back()
    page.wait_for_function("() => document.querySelector('#job').open")
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "prompt":
            break
    page.keyboard.type(f"{text} typed")
    page.keyboard.press("Control+Enter")
    card(page, f"{text} typed").wait_for()


# Dead letters and figures


def test_dead_letters_are_counted_and_redriven_one_and_all(visit, stack):
    text = word()
    ids = [bury(stack, f"{text} {n}") for n in range(2)]
    ended(stack, create(stack, f"{text} in between"))
    ids.append(bury(stack, f"{text} 2"))
    page = visit()
    page.locator("#dead:not([hidden])").wait_for()
    assert int(page.locator("#dead").inner_text()) >= 3

    page.click("#header a:has-text('Dead letters')")
    letter = page.locator(".letter", has_text=f"{text} 0")
    letter.wait_for()
    assert "r2_unreachable" in letter.inner_text()
    assert "waits at RunPod" in letter.inner_text()
    letter.locator("button").click()
    letter.wait_for(state="detached")
    assert ended(stack, ids[0])["status"] == "done"

    page.locator(".letter a", has_text=f"{text} 1").click()
    page.locator("#job .badge.dead").wait_for()
    page.keyboard.press("ArrowLeft")  # goes by the dead letters, newest first
    page.wait_for_function("(id) => location.search.includes(id)", arg=ids[2])
    page.keyboard.press("ArrowRight")
    page.wait_for_function("(id) => location.search.includes(id)", arg=ids[1])
    page.reload()  # and so by the link alone
    page.locator("#job button[aria-label='The newer job']:not([aria-disabled])").wait_for()
    page.click("#job button:has-text('Redrive')")
    page.click(".ask button.main")
    page.locator("#said", has_text="It is being stored.").wait_for()
    ended(stack, ids[1])
    page.locator("#job .badge.done").wait_for()
    assert shown(page.locator("#job .large img")) == 512
    page.keyboard.press("Escape")

    page.click("#redrive-all")
    page.click(".ask button.main")
    page.locator("#letters", has_text="There is none.").wait_for()
    assert ended(stack, ids[2])["status"] == "done"
    page.wait_for_function("() => document.querySelector('#dead').hidden")


def test_more_dead_letters_than_one_answer_has_are_redriven(visit):
    dead = {"error": "R2 did not answer.", "error_code": "r2_unreachable", "dead_at": "2026-11-01T00:00:00.000Z"}
    letters = [
        {"id": f"job-{n}", "prompt": f"a cat {n}", "tries": 3, "left": "runpod", "left_until": None, **dead}
        for n in range(150)
    ]

    def answer(route):
        begin = 100 if "cursor" in route.request.url else 0
        page_of = letters[begin : begin + 100]
        cursor = "second" if begin + 100 < len(letters) else None
        route.fulfill(json={"ok": True, "dead_letters": page_of, "next_cursor": cursor})

    def redrive(route):
        came = {"redriven": [letter["id"] for letter in letters], "lost": [], "unknown": []}
        letters.clear()
        route.fulfill(json={"ok": True, "next_cursor": None, **came})

    page = visit("?view=figures")
    page.route("**/api/dead-letters?*", answer)
    page.route("**/api/dead-letters/redrive", redrive)
    page.goto(f"{page.url.partition('?')[0]}?view=dead")
    page.dblclick("#more-letters")
    page.wait_for_function("() => document.querySelectorAll('.letter').length === 150")

    page.click("#redrive-all")
    page.click(".ask button.main")

    page.locator("#letters", has_text="There is none.").wait_for()


def test_the_figures_are_those_of_the_api(visit, stack):
    ended(stack, create(stack, word()))
    page = visit("?view=figures")
    until(page, ".tile")

    page.select_option("#days", "30")

    page.wait_for_function("() => location.search.includes('days=30')")
    stats = stack.call("GET", "/api/stats?days=30")
    page.wait_for_function(
        "(n) => document.querySelector('.tile strong').textContent === String(n)", arg=sum(stats["jobs"].values())
    )


# The key, and an API that is not there


def test_a_wrong_key_is_told_the_right_one_kept_and_forgotten(visit, stack):
    page = visit(key="", expected=[NO_ANSWER])
    page.locator("#key").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.fill("#key", "wrong")

    page.keyboard.press("Enter")
    page.locator("#key-wrong", has_text="unauthorized").wait_for()
    page.fill("#key", f" {stack.key} ")
    page.keyboard.press("Enter")

    until(page, ".card .badge, #empty")
    page.reload()
    until(page, ".card .badge, #empty")
    assert page.locator("#key").count() == 0
    page.click("#forget")
    page.locator("#key").wait_for()
    assert page.evaluate("localStorage.getItem('ob.key')") is None
    assert page.locator(".card .badge").count() == 0


def test_while_the_api_is_down_that_is_told_and_afterwards_all_goes_on(visit, tmp_path):
    ports = free_port(), free_port()
    first = Running(tmp_path / "data", ports=ports)
    page = visit(url=first.url, key=first.key, expected=[NO_ANSWER])
    page.locator("#empty", has_text="press Make").wait_for()
    page.fill("#prompt", "a cat")
    page.click("#send")
    assert shown(card(page, "a cat").locator("img")) == 512

    first.stop()
    look_again(page)
    page.locator("#down:not([hidden])", has_text="does not answer").wait_for()
    assert shown(card(page, "a cat").locator("img")) == 512
    second = Running(tmp_path / "data", ports=ports)
    page.evaluate("document.querySelector('#down button').click()")  # it may have tried by itself just now
    page.locator("#down").wait_for(state="hidden")

    assert card(page, "a cat").count() == 1
    second.stop()


def test_an_address_that_makes_no_sense_is_told_and_another_one_works(visit):
    page = visit("?status=nonsense&view=constructor", expected=[NO_ANSWER])

    page.locator("#down", has_text="status_invalid").wait_for()
    page.click("#tabs a:has-text('All')")

    until(page, ".card .badge, #empty")
    page.locator("#down").wait_for(state="hidden")


# Safe, for everybody, anywhere


def test_hostile_text_is_text(visit, stack):
    text = word()
    ids = []
    for number, bad in enumerate(HOSTILE):
        simulate = {
            "run_seconds": 0.3,
            "queue_seconds": 0,
            **({"status": "FAILED", "error": bad} if number % 2 else {}),
        }
        ids.append(create(stack, f"{text} {bad}", simulate=simulate, metadata={"note": bad[:400]}))
    for job_id in ids:
        ended(stack, job_id)
    page = visit(f"?q={text}")
    page.wait_for_function("(n) => document.querySelectorAll('.card .badge').length === n", arg=len(HOSTILE))

    assert page.locator(".card .prompt").all_text_contents() == [f"{text} {bad}" for bad in reversed(HOSTILE)]
    for job_id, bad in zip(ids, HOSTILE, strict=True):
        page.goto(f"{stack.url}/?job={job_id}")
        page.locator("#job dl").wait_for()
        assert page.locator("#job .words").text_content() == f"{text} {bad}"
        assert page.locator("#job script, #job img[src=x], #job b").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wild = visit(f"?job={'%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E%2F..%2F'}", expected=[NO_ANSWER])
    wild.locator("#job", has_text="job_not_found").wait_for()


def test_a_link_of_a_worker_or_an_old_row_that_is_none_is_not_followed(visit, stack):
    job_id = create(stack, word())
    ended(stack, job_id)
    d1(
        stack,
        "UPDATE jobs SET outputs = NULL, result_url = 'javascript:alert(1)', version = version + 1 WHERE id = ?1",
        job_id,
    )

    page = visit(f"?job={job_id}")

    page.locator("#job .large .glyph").wait_for()
    assert page.locator("#job [src^=javascript], #job [href^=javascript]").count() == 0


def test_an_old_row_that_says_no_zone_means_utc(visit, stack):
    job_id = create(stack, word())
    ended(stack, job_id)
    d1(stack, "UPDATE jobs SET created_at = '2026-11-01 20:00:00', finished_at = NULL WHERE id = ?1", job_id)

    page = visit(f"?job={job_id}")

    page.locator("#job dl", has_text="2 Nov 2026, 03:00:00").wait_for()  # in Bangkok


def test_axe_finds_nothing_serious(visit, stack):
    text = word()
    dead = bury(stack, f"{text} dead")
    done = create(stack, f"{text} done")
    failed = create(stack, f"{text} failed", simulate={"status": "FAILED"})
    waiting = create(stack, f"{text} waiting", simulate={"queue_seconds": 900})
    for job_id in (done, failed):
        ended(stack, job_id)
    page = visit(f"?q={text}", reduced_motion="reduce")
    page.wait_for_function("() => document.querySelectorAll('.card .badge').length === 4")
    page.select_option("#model", "qwen-image-edit")
    page.locator("#values summary").click()
    found = {"gallery": violations(page)}
    for job_id in (dead, done, failed, waiting):
        page.goto(f"{stack.url}/?job={job_id}")
        page.locator("#job dl").wait_for()
        page.click("text=Timeline")
        found[job_id] = violations(page)
    page.click("#job button:has-text('Cancel')")
    found["ask"] = violations(page)
    for view, ready in (("dead", ".letter"), ("figures", ".tile")):
        page.goto(f"{stack.url}/?view={view}")
        until(page, ready)
        found[view] = violations(page)
    asked = visit(key="")
    until(asked, "#key")
    found["key"] = violations(asked)

    assert found == {name: [] for name in found}
    stack.call("POST", f"/api/jobs/{waiting}/cancel", json={})


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_nothing_stands_out_at_the_side(visit, stack, width):
    job_id = create(stack, f"{'wide' * 60} {word()}")
    ended(stack, job_id)
    page = visit("?view=figures", viewport={"width": width, "height": 800}, locale="th-TH")
    for query, ready in [
        ("", ".badge"),
        (f"?job={job_id}", "#job dl"),
        ("?view=dead", "#letters li"),
        ("?view=figures", ".tile"),
    ]:
        page.goto(f"{stack.url}/{query}")
        until(page, ready)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, query
        outside = page.locator("#job[open], body").last.evaluate("""(frame) =>
            [...frame.querySelectorAll("button, input, select, textarea")]
              .filter((one) => one.offsetParent && !one.matches(".skip, .hidden"))
              .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
              .map((one) => one.outerHTML)""")
        assert outside == [], query


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/"])
def test_it_works_under_the_stage_with_and_without_a_slash_and_beside_it(visit, stack, path):
    class Gateway(BaseHTTPRequestHandler):
        """API Gateway's stage: paths begin with it outside, and not inside. Beside it the page's files as such."""

        def do_GET(self):
            asked = self.path.partition("?")[0]
            if asked in ("/v1", "/v1/"):
                text, status, kind = served.index(asked).encode(), 200, "text/html; charset=utf-8"
            elif self.path.startswith("/v1/"):
                headers = dict(self.headers)
                answer = requests.get(stack.url + self.path.removeprefix("/v1"), headers=headers, timeout=30)
                text, status, kind = answer.content, answer.status_code, answer.headers.get("Content-Type", "")
            else:
                name = asked[1:] or served.INDEX
                text, status, kind = (served.FOLDER / name).read_bytes(), 200, served.content_type(name)
                text = text.replace(b'data-api=""', b'data-api="/v1"')  # as it is written by hand
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    ended(stack, create(stack, word()))
    with serving(Gateway) as url:
        page = visit(path[1:], url=url)
        assert shown(page.locator(".card img").first) > 0
        page.locator(".card a").first.click()
        page.locator("#job dl").wait_for()
        assert page.url.startswith(f"{url}{path}?job=")


class Shelf(SimpleHTTPRequestHandler):
    """A host that has the page's files and knows nothing of the service."""

    def log_message(self, *args):
        pass


def test_any_static_host_can_have_it(visit, stack):
    text = word()
    with serving(functools.partial(Shelf, directory=served.FOLDER)) as host:
        page = visit(url=host, key="", expected=[NO_ANSWER])
        page.fill("#address", stack.url)
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.locator("#key-wrong", has_text="unauthorized").wait_for()
        assert page.input_value("#address") == f"{stack.url}/"
        page.fill("#key", stack.key)
        page.keyboard.press("Enter")

        page.select_option("#model", "qwen-image-edit")
        page.set_input_files("#choose", picture())
        page.fill("#prompt", text)
        page.click("#send")
        assert shown(card(page, text).locator("img")) > 0
        page.reload()  # and is not asked again
        card(page, text).locator("a").click()
        assert shown(page.locator("#job .large img")) > 0
        with page.expect_download() as download:
            page.click("#job button:has-text('Download')")
        assert download.value.suggested_filename.startswith(text)
        page.click("#job button:has-text('Delete')")
        page.click(".ask button.bad")
        card(page, text).wait_for(state="detached")
        page.wait_for_url(f"{host}/")
    assert listed(stack, text) == []
