"""A run's figures are found where they were sent."""

import pytest

from brainray.orchestration.publish import how_to_open


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("https://mlflow.example.org/team", "https://mlflow.example.org/team"),
        ("databricks://profile", "databricks://profile"),
        ("sqlite:////data/mlflow.db", "mlflow ui --backend-store-uri sqlite:////data/mlflow.db"),
        (
            "sqlite:////my data/mlflow.db",
            "mlflow ui --backend-store-uri 'sqlite:////my data/mlflow.db'",
        ),
        ("postgresql://db/mlflow", "mlflow ui --backend-store-uri postgresql://db/mlflow"),
    ],
)
def test_a_server_has_a_page_and_a_database_needs_a_command(uri: str, expected: str) -> None:
    assert how_to_open(uri) == expected
