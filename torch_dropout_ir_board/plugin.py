"""Routes of the tab: static files, and records as JSON."""

import functools
import json
from pathlib import Path

from tensorboard import plugin_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from torch_dropout_ir_board.reading import ROUTES, answer

STATIC = Path(__file__).parent / "static"
_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}


class BoardPlugin(base_plugin.TBPlugin):
    """Serves the tab."""

    plugin_name = "dropout_ir"

    def __init__(self, context):
        self._provider = context.data_provider

    def get_plugin_apps(self):
        """Return the routes."""
        makes = {r: functools.partial(self._answer, route=r) for r in ROUTES}
        for file in STATIC.iterdir():
            kind = _TYPES[file.suffix]
            makes[file.name] = lambda _, f=file, k=kind: (f.read_bytes(), k)
        return {f"/{name}": _served(make) for name, make in makes.items()}

    def is_active(self):
        """Return False: TensorBoard looks for data of `data_plugin_names` itself."""
        return False

    def data_plugin_names(self):
        """Return the kinds of data that the tab reads."""
        return ("images", "histograms", "scalars")

    def frontend_metadata(self):
        """Return name and module of the tab."""
        return base_plugin.FrontendMetadata(
            es_module_path="/index.js", tab_name="Dropout IR"
        )

    def _answer(self, request, route):
        env = request.environ
        about = plugin_util.context(env), plugin_util.experiment_id(env)
        found = answer(self._provider, *about, route, *request.args.getlist("of"))
        return json.dumps(found), "application/json"


def _served(make):
    @wrappers.Request.application
    def serve(request):
        try:
            (content, kind), status = make(request), 200
        except Exception as err:
            content = json.dumps({"error": f"{type(err).__name__}: {err}"})
            kind, status = "application/json", 404
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        return wrappers.Response(content, status, headers, content_type=kind)

    return serve
