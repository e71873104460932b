"""`hfq bench`: latency, load time, size and memory of hfq beside other int8 runtimes, in turn, in one run."""
