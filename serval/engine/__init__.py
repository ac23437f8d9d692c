"""The engine: request -> scheduler -> runner -> sampler -> request.

`LLM` is the way in; `Engine` is the step loop; `AsyncLLM` runs it in a thread for the server.
"""
