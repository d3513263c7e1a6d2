"""TorchServe's side of gpt_fast: rounds in, replies out. Everything else is in the package."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ts.metrics.metric_type_enum import MetricTypes
from ts.torch_handler.base_handler import BaseHandler

from gpt_fast.engine import ranks
from gpt_fast.serve.archive_files import check_archive
from gpt_fast.serve.exchange import Incoming, Reply, client_id_of
from gpt_fast.serve.foreign_page import refusal_of
from gpt_fast.serve.metrics import Reporter
from gpt_fast.serve.one_worker import claim_model
from gpt_fast.serve.startup import start_serving
from gpt_fast.serve.startup_check import (
    STARTUP_ERROR,
    check_own_frontend,
    close_key_file,
    own_frontend,
    own_frontend_asks_for_token,
)

logger = logging.getLogger(__name__)


def incoming(headers: dict[str, str], data: dict[str, Any], *, local_only: bool) -> Incoming:
    """A request's first round. What comes by gRPC has no path.

    local_only: answer nobody whom a web page from elsewhere may have sent.
    """
    body = data.get("body", data.get("data"))
    path, one_message = headers.get("url_path") or "", "url_path" not in headers
    refused = refusal_of(headers.items()) if local_only else None
    return Incoming(path, body, client_id_of(headers), one_message=one_message, refused=refused)


class GptFastHandler(BaseHandler):
    """Serves one checkpoint through continuousBatching; gpt_fast.serve.rounds explains the rounds."""

    def initialize(self, context: Any) -> None:
        """Load, warm up and start the engine. The worker is ready when this returns, and not before."""
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"  # TorchServe's JSON takes NaN, and the last of repeated keys
        root = Path(os.environ.get("GPT_FAST_ROOT") or context.system_properties["model_dir"])
        name = context.manifest["model"]["modelName"]
        try:
            check_archive(Path(context.system_properties["model_dir"]))
            if problems := check_own_frontend():
                raise ValueError(problems[0])
            close_key_file()
            self.local_only = not own_frontend_asks_for_token()
            group = ranks.join() if ranks.launched() else None
            if group is None or group.leads:
                self.claim = claim_model(f"{name} {context.manifest['model'].get('modelVersion')}")
            rounds = start_serving(context.model_yaml_config, root=root, model_name=name, group=group)
        except ValueError as error:  # the configuration or the checkpoint is at fault: one line, not a trace
            logger.error("%s%s", STARTUP_ERROR, error)
            raise
        self.context = context
        self.follows = rounds is None
        if rounds is not None:
            self.rounds = rounds
            rounds.desk.report_forever(Reporter(self.emit))
        self.described = ""  # the last describe job
        self.initialized = True

    def emit(self, kind: str, name: str, value: float, label: str) -> None:
        """One figure for TorchServe's metrics endpoint."""
        dimensions = [self.context.model_name, "Model", *([label] if label else [])]
        metric = self.context.metrics.get_metric(f"gpt_fast_{name}", MetricTypes[kind.upper()])
        metric.add_or_update(value, dimensions)

    def describe(self, request_id: str) -> dict[str, Reply]:
        """The answer to `?customized=true` on the management port.

        TorchServe 0.12 puts such a job back at the head of its queue (Model.pollInferJob), where it comes again for
        ever and nothing behind it ever comes, while the model is called READY. Nothing that a worker says ends that, so
        one that sees it ends TorchServe: whoever keeps it running starts it anew.
        """
        if request_id == self.described and (frontend := own_frontend()):
            logger.error("TorchServe's queue is blocked by a describe job (?customized=true): ending it")
            frontend.terminate()
            raise SystemExit(1)
        self.described = request_id
        return {request_id: self.rounds.description()}

    def preprocess(self, data: list[dict[str, Any]]) -> dict[str, Incoming]:
        """The requests of this round that carry a body, i.e. are new, by id."""
        return {
            request_id: incoming(self.context.get_all_request_header(index), data[index], local_only=self.local_only)
            for index, request_id in self.context.request_ids.items()
            if not self.rounds.knows(request_id)
        }

    def inference(self, data: dict[str, Incoming], *args: Any, **kwargs: Any) -> dict[str, Reply]:
        """One round: admit, drop what lost its client, take what was decoded since the last round."""
        if failure := self.rounds.service.failure():
            logger.error("gpt-fast gives up, to be restarted: %s", failure)
            raise SystemExit(1)  # the only exception that TorchServe lets end the worker
        return self.rounds.run(self.context.request_ids.values(), data)

    def postprocess(self, data: dict[str, Reply]) -> list[str]:
        """Hand each reply to TorchServe; an id that gets nothing now is left out of the round's answer."""
        texts = [""] * len(self.context.request_ids)
        stop: list[bool | None] = [None] * len(texts)  # of a stream: was this its last chunk?
        for index, request_id in list(self.context.request_ids.items()):
            reply = data.get(request_id)
            if reply is None:
                del self.context.request_ids[index]
                continue
            texts[index], stop[index] = reply.text, None if reply.more is None else not reply.more
            self.context.set_response_content_type(index, reply.content_type)
            self.context.set_response_status(reply.status, reply.reason, index)
            for name, value in reply.headers:
                self.context.set_response_header(index, name, value)
        self.context.stopping_criteria = [lambda _, value=value: value for value in stop]
        return texts

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """A round. TorchServe sends it to every rank and reads rank 0's answer only."""
        if self.follows:
            return [""] * len(data)
        self.context = context
        if self._is_describe():
            return self.postprocess(self.describe(context.request_ids[0]))
        return self.postprocess(self.inference(self.preprocess(data)))
