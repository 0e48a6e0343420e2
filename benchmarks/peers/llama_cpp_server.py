"""llama.cpp's HTTP server out of the package ``xllamacpp``; its own environment runs this file.

    .../peers/llama.cpp/bin/python benchmarks/peers/llama_cpp_server.py MODEL.gguf 8080 9216 32

Arguments: the model, the port, the context of one chat in tokens, and the chats at once.
"""

import os
import signal
import sys

import xllamacpp


def main(path: str, port: int, max_model_len: int, max_num_seqs: int) -> None:
    """Serve ``path`` on 127.0.0.1 until SIGINT or SIGTERM."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.hostnames = ["127.0.0.1"]
    params.port = port
    # Slots share one cache of full-attention cells, as far as they need it.
    params.kv_unified = True
    params.n_ctx = max(4 * max_model_len, 512 * max_num_seqs)
    params.n_parallel = max_num_seqs
    params.cpuparams.n_threads = len(os.sched_getaffinity(0))
    params.cpuparams_batch.n_threads = params.cpuparams.n_threads
    params.ui = False
    server = xllamacpp.Server(params)
    print(f"listening at {server.listening_address}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        os._exit(0)  # the server's threads would go on


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
