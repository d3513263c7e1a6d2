"""A handler with the real one's transport (continuous batching, an own thread) and no model: it streams numbers.

The request is a JSON object {"n": how many, "pause": seconds between two}; `handler: {fail: text}` fails to load.
"""

import json
import os
import threading
import time

from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes
from ts.torch_handler.base_handler import BaseHandler

import gpt_fast
from gpt_fast.serve.startup_check import check_own_frontend


class DummyHandler(BaseHandler):
    def initialize(self, ctx):
        settings = ctx.model_yaml_config["handler"]
        if problems := check_own_frontend():
            raise ValueError(problems[0])
        if "die" in settings:
            os._exit(9)
        if "fail" in settings:
            raise ValueError(settings["fail"])
        self.lock, self.streams, self.initialized = threading.Condition(), {}, True

    def handle(self, data, ctx):
        ids, out, stop = ctx.request_ids, [""] * len(data), [lambda _: None] * len(data)
        with self.lock:
            for gone in set(self.streams) - set(ids.values()):
                del self.streams[gone]
            for i, request in ids.items():
                if request not in self.streams:
                    if ctx.get_request_header(i, "url_path") == "health":
                        out[i] = "{}"
                        continue
                    if os.path.exists(os.environ.get("GPT_FAST_DRAIN_FILE", "")):
                        ctx.set_response_status(503, "Service Unavailable", i)
                        out[i] = "draining\n"
                        continue
                    self.streams[request] = {"new": [], "sent": False, "done": False}
                    body = json.loads(data[i]["body"])
                    threading.Thread(target=self.produce, args=(self.streams[request], body), daemon=True).start()
            self.lock.wait_for(
                lambda: any(out) or any(s["new"] or s["done"] for s in self.streams.values()), timeout=0.1
            )
            for i, request in list(ids.items()):
                self.answer(i, request, ids, out, stop)
            self.publish(ctx, len(self.streams))
        ctx.stopping_criteria = stop
        return out

    def publish(self, ctx, running):
        of_model = [Dimension("ModelName", ctx.model_name), Dimension("Level", "Model")]
        name = "gpt_fast_num_requests_running"
        ctx.metrics.add_metric(name, running, unit="Count", dimensions=of_model, metric_type=MetricTypes.GAUGE)

    def answer(self, i, request, ids, out, stop):
        stream = self.streams.get(request)
        if stream is None:
            return
        if not stream["new"] and not stream["done"]:
            ids.pop(i)
            return
        out[i] = "".join(stream["new"])
        stream["new"].clear()
        if stream["done"]:
            stop[i] = (lambda _: True) if stream["sent"] else (lambda _: None)
            del self.streams[request]
        else:
            stop[i], stream["sent"] = (lambda _: False), True

    def produce(self, stream, body):
        facts = f"root={os.environ.get('GPT_FAST_ROOT')} package={gpt_fast.__file__}\n"
        for text in [facts, *(f"{n}\n" for n in range(body["n"]))]:
            time.sleep(body["pause"])
            with self.lock:
                stream["new"].append(text)
                self.lock.notify_all()
        with self.lock:
            stream["done"] = True
            self.lock.notify_all()
