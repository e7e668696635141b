"""The laboratory: measurements of real servers, over HTTP and subprocesses. The product never imports it."""
