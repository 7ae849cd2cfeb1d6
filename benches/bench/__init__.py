"""The benchmark behind scripts/bench: ringfence, Envoy and their like, in turn, on the same work.

    base       programs, ports, failures: what everything here stands on
    account    what the kernel says that a process has used: CPU, switches, memory, syscalls
    world      the applications, and the agent that issues the certificates
    envoy      Envoy's configuration as Consul generates it
    peers      each peer as a pair of sidecars, and what it says of its handshakes
    loads      the load programs, each giving one dictionary of figures
    workloads  what is measured, with sizes
    session    the plan, the rounds A B A B, and what goes wrong in them
    figures    medians, spreads and ratios out of single runs; the targets
    report     report.md
    plots      the SVG files, drawn by a Python that has matplotlib
    compare    two results against each other
    cli        the command line
"""
