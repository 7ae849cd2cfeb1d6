"""End to end: real Airflow, real Consul with ACLs, real PostgreSQL and Redis, with ringfence between all of them.

The map, from the machine upwards:

    machine     scratch folder, processes, cgroups in the place of systemd's units, a network of its own, the end of it all
    install     virtual environments with Airflow, and the provider of this tree
    consul      the agent, its tokens and intentions
    servers     PostgreSQL and Redis
    sidecars    the ringfence processes, and what their connection logs say
    airflow     one deployment: files of `ringfence airflow init`, units, runs and task logs
    truth       what tasks said of themselves, beside what ringfence logged
    story       what is tried, in order
    upheaval    restart of ringfence and rotation of the CA while a DAG runs
    report      what was checked
    cli         the command line

Invariant: a check compares with what somebody else than ringfence says: the task itself, Airflow's database, the database
server.
"""
