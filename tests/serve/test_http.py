"""The default model behind a real TorchServe: both protocols, many clients, bad input, disconnects, figures, logs."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.server import ROOT, Server, shared_server

pytestmark = [pytest.mark.server, pytest.mark.model]
MODEL = ROOT / "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT = {"prompt": "The capital of France", "max_new_tokens": 5}


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120)


# ------------------------------------------------------------------------------------------- the native protocol


def test_curl_with_the_example_request(server):
    command = ["curl", "-sS", "-N", "--max-time", "60", server.url, "-T", str(ROOT / "request.json")]
    shown = subprocess.run(
        [*command, "-w", "\n%{http_code} %{content_type}"], capture_output=True, text=True, timeout=90
    )
    text, _, facts = shown.stdout.rpartition("\n")
    assert facts == "200 text/plain; charset=utf-8"
    assert text.startswith(" is Paris")
    body = json.loads((ROOT / "request.json").read_text())
    assert server.call(body | {"stream": False}).text == text


def test_tokens_arrive_as_they_are_made(server):
    chunks = server.chunks({"prompt": "Once upon a time", "max_new_tokens": 200, "ignore_eos": True})
    assert len(chunks) > 3  # the first token by itself, then a chunk every stream_interval
    whole = server.call({"prompt": "Once upon a time", "max_new_tokens": 200, "ignore_eos": True, "stream": False})
    assert b"".join(chunks) == whole.body


def test_emoji_and_cjk_stream_intact(server):
    """Tokens that end inside characters: each chunk is text, together they are the decode of all bytes."""
    from gpt_fast.text.load_tokenizer import load_tokenizer

    tokens = load_tokenizer(MODEL).encode("👩‍👩‍👧 🏴󠁧󠁢󠁳󠁣󠁴󠁿 汉字かな 🙂 한국어")
    body = {
        "max_tokens": 120,
        "temperature": 5.0,
        "seed": 7,
        "ignore_eos": True,
        "logprobs": True,
        "messages": [{"role": "user", "content": "Write only emoji: 🙂汉"}],
        "logit_bias": {str(token): 60 for token in set(tokens)},
    }
    (choice,) = server.call(body, "/1.0/v1/chat/completions").json["choices"]
    whole = choice["message"]["content"]
    assert (
        bytes(b for entry in choice["logprobs"]["content"] for b in entry["bytes"]).decode("utf-8", "replace") == whole
    )
    chunks = server.chunks(body | {"stream": True, "logprobs": False}, "/1.0/v1/chat/completions")
    events = [json.loads(line[6:]) for chunk in chunks for line in chunk.decode("utf-8").split("\n\n") if "{" in line]
    deltas = [choice["delta"].get("content", "") for event in events for choice in event["choices"]]
    assert "".join(deltas) == whole
    assert any(char > "\uffff" for char in whole) and any("\u3000" < char < "\ufffd" for char in whole)
    real = server.chunks({"prompt": "你好，请介绍一下北京。", "max_new_tokens": 40})
    assert [chunk.decode("utf-8") for chunk in real]


# ------------------------------------------------------------------------------------------- OpenAI's client


def test_openai_models(client):
    assert [model.id for model in client.models.list().data] == ["gpt-fast"]
    assert client.models.retrieve("gpt-fast").id == "gpt-fast"


def test_openai_chat_whole_and_streamed(client):
    ask = {"model": "gpt-fast", "messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 30}
    ask |= {"temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**ask)
    assert whole.usage.completion_tokens <= 30 and whole.usage.prompt_tokens > 10
    (choice,) = whole.choices
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    assert choice.logprobs.content[0].top_logprobs[0].logprob == choice.logprobs.content[0].logprob
    events = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].usage.total_tokens == whole.usage.total_tokens and events[-1].choices == []
    assert events[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1  # asked a second time
    assert events[-2].choices[0].finish_reason == choice.finish_reason
    text = "".join(event.choices[0].delta.content or "" for event in events[:-1])
    assert text == choice.message.content


def test_openai_completions_n_stop_seed_echo(client):
    ask = {"model": "gpt-fast", "prompt": ["One, two,", "A, B,"], "n": 2, "max_tokens": 12, "seed": 3}
    first = client.completions.create(**ask)
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert [c.text for c in first.choices] == [c.text for c in client.completions.create(**ask).choices]
    texts = ["", "", "", ""]
    for event in client.completions.create(**ask, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in first.choices]
    stopped = client.completions.create(
        model="gpt-fast", prompt="One, two,", temperature=0, max_tokens=40, stop=["five", " 5"], echo=True
    )
    assert stopped.choices[0].text.startswith("One, two,") and "five" not in stopped.choices[0].text
    logged = client.completions.create(model="gpt-fast", prompt="One, two,", temperature=0, max_tokens=4, logprobs=3)
    assert len(logged.choices[0].logprobs.tokens) == 4


def test_openai_responses(client):
    ask = {"model": "gpt-fast", "instructions": "Be short.", "input": "Name three colours.", "temperature": 0}
    whole = client.responses.create(**ask)
    with client.responses.stream(**ask) as stream:
        assert stream.get_final_response().output_text == whole.output_text != ""
    assert whole.status == "completed" and whole.usage.output_tokens > 0


def test_anthropics_client(server):
    import anthropic

    client = anthropic.Anthropic(
        base_url=server.base_url.removesuffix("/v1"), api_key="none", max_retries=0, timeout=120
    )
    ask = {"model": "gpt-fast", "system": "Be short.", "messages": [{"role": "user", "content": "Name three colours."}]}
    greedy = {"max_tokens": 30, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**ask, **greedy)
    with client.messages.stream(**ask, **greedy) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        usage = stream.get_final_message().usage
    prompt_tokens = whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert usage.output_tokens == whole.usage.output_tokens
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (1, prompt_tokens - 1)  # asked a second time
    assert client.messages.count_tokens(**ask).input_tokens == prompt_tokens
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        client.messages.create(**ask | {"model": "other"}, **greedy)


PLACE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["city", "country", "million_people"],
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "country": {"type": "string", "maxLength": 30},
        "million_people": {"type": "integer", "minimum": 0, "maximum": 40},
    },
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}


def test_openai_response_format(client):
    ask = {"model": "gpt-fast", "max_tokens": 120, "temperature": 0, "response_format": FORMAT}
    ask |= {"messages": [{"role": "user", "content": "Describe the capital of France as JSON."}]}
    (choice,) = client.chat.completions.create(**ask).choices
    value = json.loads(choice.message.content)
    assert choice.finish_reason == "stop" and set(value) == set(PLACE["required"])
    assert value["city"] == "Paris" and 0 <= value["million_people"] <= 40
    events = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == choice.message.content
    (cut,) = client.chat.completions.create(**ask | {"max_tokens": 5}).choices
    assert cut.finish_reason == "length" and choice.message.content.startswith(cut.message.content)
    objects = client.completions.create(
        model="gpt-fast", prompt="JSON:", n=4, max_tokens=200, seed=1, extra_body={"response_format": FORMAT}
    )
    assert all(set(json.loads(each.text)) == set(value) for each in objects.choices if each.finish_reason == "stop")


def test_openai_response_format_beside_others(server, client):
    """Eight with schemas and without, together: each is what it is alone."""

    def answer(number):
        guided = {"response_format": FORMAT} if number % 2 else {}
        messages = [{"role": "user", "content": f"Tell me about city number {number}."}]
        given = {"messages": messages, "max_tokens": 60, "seed": number, **guided}
        return client.chat.completions.create(model="gpt-fast", **given).choices[0].message.content

    alone = [answer(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, range(8))) == alone


def test_openai_errors(client):
    import openai

    ask = {"model": "gpt-fast", "messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask, temperature=-1)
    assert caught.value.param == "temperature" and "allowed 0.0.." in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask, extra_body={"tempreature": 1})
    assert caught.value.param == "tempreature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**ask | {"model": "gpt-4"})
    assert missing.value.code == "model_not_found"


# ------------------------------------------------------------------------------------------- company


def test_eight_mixed_requests_are_each_what_they_are_alone(server):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is rain?"}]
    requests = [
        ("", {"prompt": "The capital of France", "max_new_tokens": 40}),
        ("", {"prompt": "def fibonacci(n):", "max_new_tokens": 60, "stream": False}),
        ("", {"prompt": "word " * 700, "max_new_tokens": 8}),
        ("", {"prompt": "Hello", "max_new_tokens": 1}),
        ("/1.0/v1/completions", {"prompt": "Roses are", "max_tokens": 50, "temperature": 0.9, "seed": 5, "n": 2}),
        ("/1.0/v1/completions", {"prompt": "汉字", "max_tokens": 20, "temperature": 0, "repetition_penalty": 1.3}),
        ("/1.0/v1/chat/completions", {"messages": chat, "max_tokens": 40, "temperature": 0}),
        ("/1.0/v1/chat/completions", {"messages": chat, "max_tokens": 40, "seed": 1, "top_p": 0.9, "top_k": 40}),
    ]

    def answer(request: tuple[str, dict]) -> object:
        response = server.call(request[1], request[0])
        assert response.status == 200, response.body
        if not request[0]:
            return response.text
        return [(c.get("text") or c["message"]["content"], c["finish_reason"]) for c in response.json["choices"]]

    alone = [answer(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, requests))
    assert together == alone


# ------------------------------------------------------------------------------------------- bad input

CHAT, COMPLETION = "/1.0/v1/chat/completions", "/1.0/v1/completions"
TOOL = {"type": "function", "function": {"name": "clock"}}
BAD = [
    ("", b"", 400, None),
    ("", b"\xff\xfe", 400, None),
    ("", b"null", 400, None),
    ("", b"[1]", 400, None),
    ("", b'"text"', 400, None),
    ("", b"{", 400, None),
    ("", b'{"prompt": "x"} x', 400, None),
    ("", b'{"prompt": NaN}', 400, None),
    ("", b'{"prompt": "x", "prompt": "y"}', 400, None),
    ("", b'{"prompt": "\\ud800"}', 400, None),
    ("", b"[" * 100_000, 400, None),
    ("", b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, None),
    ("", {}, 400, "prompt"),
    ("", {"prompt": ""}, 400, "prompt"),
    ("", {"prompt": 5}, 400, "prompt"),
    ("", {"prompt": [1, "x"]}, 400, "prompt"),
    ("", {"prompt": [49152]}, 400, "prompt"),
    ("", {"prompt": "word " * 9000}, 400, "prompt"),
    ("", {"prompt": "x", "max_new_tokens": 0}, 400, "max_new_tokens"),
    ("", {"prompt": "x", "max_new_tokens": 1.5}, 400, "max_new_tokens"),
    ("", {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
    ("", {"prompt": "x", "top_p": 0}, 400, "top_p"),
    ("", {"prompt": "x", "top_k": -2}, 400, "top_k"),
    ("", {"prompt": "x", "stop": [""]}, 400, "stop"),
    ("", {"prompt": "x", "stream": 1}, 400, "stream"),
    ("", {"prompt": "x", "max_tokens": 5}, 400, "max_tokens"),
    ("", {"prompt": "x", "timeout": -1}, 400, "timeout"),
    (CHAT, {"messages": "hi"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "n": 99}, 400, "n"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "audio": {"voice": "alloy"}}, 400, "audio"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}, 400, "tools"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "xml"}},
        400,
        "response_format.type",
    ),
    (
        CHAT,
        {
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "robot"}}},
        },
        400,
        "response_format",
    ),
    (COMPLETION, {"prompt": "x", "stop_token_ids": [49152]}, 400, "stop_token_ids"),
    (COMPLETION, {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    (COMPLETION, {"prompt": "x", "model": "other"}, 404, "model"),
    ("/1.0/v1/nothing", {"prompt": "x"}, 404, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD)
def test_bad_input_is_one_json_error_that_names_the_field(server, path, body, status, param):
    refused = server.call(body, path)
    assert refused.status == status, refused
    assert refused.headers["content-type"] == "application/json"
    error = refused.json["error"]
    assert error["param"] == param and len(refused.body) < 1500
    assert param is None or param in error["message"]


def test_after_all_that_the_next_request_works(server):
    assert server.call(SHORT).text.startswith(" is Paris")
    assert server.call(b"x" * (2 << 20)).status == 413  # TorchServe's own answer, without a body


def test_other_paths_are_404(server):
    assert server.call(SHORT, "/9.9").status == 404
    assert server.call(SHORT, "/1.0/v1").status == 404
    assert server.call(None, "/1.0/v1/models/other", method="GET").status == 404
    import urllib.error
    import urllib.request

    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{server.origin}/predictions/other", data=b"{}", timeout=20)
    assert caught.value.code == 404


# ------------------------------------------------------------------------------------------- disconnects, deadlines

LONG = {"prompt": "Once upon a time", "max_new_tokens": 3000, "ignore_eos": True}


@pytest.mark.parametrize("company", [0, 2])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_within_a_second(server, stream, company):
    times = sorted(seconds_until_free(server, stream, company) for _ in range(3))
    print(f"stream {stream}, {company} others: " + ", ".join(f"{each:.2f} s" for each in times))
    assert times[1] < 1.0  # a machine that is busy with other things may be late once


def seconds_until_free(server, stream, company):
    """From a client's leaving until the figures say that its slot is free."""
    server.wait_for(lambda figures: figures["num_requests_running"] == 0, seconds=20)
    others = [server.connect(LONG | {"prompt": f"Story {n}:"}) for n in range(company)]
    client = server.connect(LONG | {"stream": stream})
    server.wait_for(lambda figures: figures["num_requests_running"] == company + 1, seconds=20)
    time.sleep(0.5)
    before = server.metrics().get("requests_cancelled_total", 0)
    client.close()
    seconds = server.wait_for(lambda figures: figures["num_requests_running"] == company, seconds=10)
    if company:  # a client that was the last one is counted when the next comes
        server.wait_for(lambda figures: figures["requests_cancelled_total"] == before + 1, seconds=1)
    for other in others:
        other.close()
    return seconds


def test_the_cancelled_are_counted_and_the_slots_serve_again(server):
    server.wait_for(lambda figures: figures["num_requests_running"] == 0, seconds=10)
    before = server.metrics().get("requests_cancelled_total", 0.0)
    clients = [server.connect(LONG) for _ in range(8)]
    server.wait_for(lambda figures: figures["num_requests_running"] == 8, seconds=20)
    for client in clients:
        client.close()
    assert server.call(SHORT).status == 200  # the round it starts finds the others gone
    server.wait_for(lambda figures: figures.get("requests_cancelled_total", 0.0) >= before + 8, seconds=10)


def test_a_request_ends_at_its_timeout(server):
    begin = time.monotonic()
    response = server.call({"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "timeout": 0.7}, COMPLETION)
    assert response.json["choices"][0]["finish_reason"] == "length"
    assert 0 < response.json["usage"]["completion_tokens"] < 4000
    assert time.monotonic() - begin < 5


# ------------------------------------------------------------------------------------------- figures and logs


def test_figures_while_load_runs(server):
    server.wait_for(lambda figures: figures["num_requests_running"] == 0, seconds=10)
    before = server.metrics()
    body = {"prompt": "Count: 1, 2, 3,", "max_new_tokens": 200, "ignore_eos": True, "stream": False}
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(server.call(body).status)) for _ in range(24)]
    for thread in threads:
        thread.start()
    server.wait_for(lambda figures: figures["num_requests_running"] == 16, seconds=20)
    server.wait_for(
        lambda figures: figures["num_requests_waiting"] > 0 and figures["kv_cache_usage_perc"] > 0, seconds=5
    )
    for thread in threads:
        thread.join()
    assert results == [200] * 24
    timed = ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time")
    expected = {f"{name}_seconds_count": 24 for name in timed}
    expected |= {"generation_tokens_total": 4800, "request_success_total:length": 24}
    # The front end takes in a round's figures one by one.
    server.wait_for(lambda f: all(f[k] - before.get(k, 0.0) >= v for k, v in expected.items()), seconds=5)
    server.wait_for(lambda figures: figures["num_requests_running"] == 0, seconds=5)
    after = server.metrics()
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    assert {name: gained[name] for name in expected} == expected
    assert gained["prefix_cache_hits_total"] >= 0 and gained["recompiles_total"] == 0
    assert after["num_requests_waiting"] == after["kv_cache_usage_perc"] == 0


def test_a_full_server_answers_429_at_once(server):
    clients = [server.connect(LONG) for _ in range(16 + 24)]
    server.wait_for(lambda figures: figures["num_requests_waiting"] == 24, seconds=20)
    begin = time.monotonic()
    late = server.call(SHORT)
    assert time.monotonic() - begin < 2
    assert (late.status, late.headers["retry-after"]) == (429, "1")
    assert late.json["error"]["code"] == "queue_full"
    for client in clients:
        client.close()
    server.wait_for(lambda figures: figures["num_requests_running"] == 0, seconds=10)
    assert server.call(SHORT).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_own_id_comes_back(server, stream):
    body, headers = {"prompt": "A", "max_tokens": 2, "stream": stream}, {"X-Request-ID": f"mine-{stream}"}
    response = server.call(body, "/1.0/v1/completions", headers=headers)
    assert response.headers["x-client-request-id"] == f"mine-{stream}" and f'"cmpl-mine-{stream}"' in response.text
    time.sleep(0.5)
    (line,) = [line for line in server.instance.worker_lines() if f'"client_request_id": "mine-{stream}"' in line]
    assert response.headers["x-request-id"] in line


def test_one_log_line_a_request_and_never_its_text(server):
    response = server.call({"prompt": "xylophone quartz", "max_new_tokens": 5, "stream": False})
    refused = server.call({"prompt": "xylophone quartz", "seed": "xylophone"})
    time.sleep(0.5)
    lines = [line for line in server.instance.worker_lines() if line.startswith("request ")]
    for answer in (response, refused):
        assert len([line for line in lines if answer.headers["x-request-id"] in line]) == 1
    fields = json.loads(next(line for line in lines if response.headers["x-request-id"] in line)[len("request ") :])
    assert fields["generation_tokens"] == 5 and fields["finish_reasons"] == ["length"]
    logs = "".join(path.read_text(errors="replace") for path in server.instance.logs.glob("*.log"))
    assert not re.search("xylophone", logs)
    assert "Traceback" not in logs and not re.search("request .* failed: ", logs)
