"""Processes that begin with everything imported, which takes any other seconds."""

import multiprocessing

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["numprune.cli", "transformers.models.llama.modeling_llama", "tasks.releases.ledger"])
