"""The "Dropout IR" tab of TensorBoard.

TensorBoard loads this module at every start in the environment, whatever it shows: it
imports nothing but TensorBoard itself, and what fails further on costs the tab alone.
"""

import logging

from tensorboard.plugins import base_plugin


class BoardLoader(base_plugin.TBLoader):
    """Loads the tab, or nothing where that fails."""

    def load(self, context):
        """Return the plugin; None, with a line in the log, where it cannot be had."""
        try:
            from torch_dropout_ir_board.plugin import BoardPlugin

            return BoardPlugin(context)
        except Exception as err:
            logging.getLogger("tensorboard").warning("no Dropout IR tab: %r", err)
