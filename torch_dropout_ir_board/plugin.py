"""Routes of the tab: static files, and records as JSON."""

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
        files = {f"/{file.name}": _file(file) for file in STATIC.iterdir()}
        return files | {f"/{route}": self._route(route) for route in ROUTES}

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

    def _route(self, route):
        @wrappers.Request.application
        def serve(request):
            try:
                context = plugin_util.context(request.environ)
                experiment = plugin_util.experiment_id(request.environ)
                of = request.args.getlist("of")
                found = answer(self._provider, context, experiment, route, *of)
                return _response(json.dumps(found), "application/json")
            except Exception as err:
                said = json.dumps({"error": f"{type(err).__name__}: {err}"})
                return _response(said, "application/json", 404)

        return serve


def _file(path):
    @wrappers.Request.application
    def serve(_):
        return _response(path.read_bytes(), _TYPES[path.suffix])

    return serve


def _response(content, kind, status=200):
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    return wrappers.Response(content, status, headers, content_type=kind)
