"""The op table on CPUs, in C++."""
