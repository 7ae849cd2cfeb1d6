"""The same names in Airflow 2.11 and 3."""

try:
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.providers.standard.triggers.temporal import TimeDeltaTrigger
    from airflow.sdk import BaseOperator, dag, task
except ImportError:
    from airflow.decorators import dag, task
    from airflow.models import BaseOperator
    from airflow.operators.bash import BashOperator
    from airflow.triggers.temporal import TimeDeltaTrigger

__all__ = ["BaseOperator", "BashOperator", "TimeDeltaTrigger", "dag", "task"]
