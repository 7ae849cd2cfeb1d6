"""ringfence for Apache Airflow: each task try reaches the services of a Consul mesh under an identity of its own.

The map, from the socket upwards:

    client      speaks to ringfence's socket; the only module that does
    task_try    who this process runs, from what Airflow itself put there before DAG code ran
    listener    registers the task try and takes it back; plugin hands it to Airflow, with the operator link
    routes      the mesh's names and their local addresses
    rewriting   one Connection's fields, towards a route; pure
    secrets     the secrets backend: the deployment's own, then rewriting, or refusal
    catalog     facts of DAGs and roles from the metadata database, for ringfence's rules
    doctor      what is set up and what is not
    commands    the `mesh` commands; command_line hands them to Airflow and to the script `ringfence-airflow`
    provider    what Airflow's provider manager wants to know

Invariant: nothing here gives an identity. ringfence decides from what the kernel says of a process; this package only tells it
what to look for, and never lets a mesh connection fall back to its original address.
"""

__version__ = "0.1.0"
