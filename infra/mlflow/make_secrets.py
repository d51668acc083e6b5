"""Creates the passwords for compose.yaml, readable by their owner only: `python infra/mlflow/make_secrets.py`.

Writes the folder secrets/ next to this file; an existing folder is kept. The admin's password is in
secrets/mlflow.env.
"""

import os
import secrets
import sys
from pathlib import Path


def contents() -> dict[str, str]:
    """File name -> text. Services that connect to each other get the same password."""
    database, access, secret, admin, flask = (secrets.token_hex(24) for _ in range(5))
    uri = f"postgresql://mlflow:{database}@database:5432/mlflow"
    return {
        "database.env": f"POSTGRES_PASSWORD={database}\n",
        "store.env": f"ROOT_ACCESS_KEY={access}\nROOT_SECRET_KEY={secret}\n",
        "mlflow.env": f"MLFLOW_BACKEND_STORE_URI={uri}\n"
        f"MLFLOW_AUTH_ADMIN_USERNAME=admin\nMLFLOW_AUTH_ADMIN_PASSWORD={admin}\n"
        f"MLFLOW_FLASK_SERVER_SECRET_KEY={flask}\nAWS_ACCESS_KEY_ID={access}\nAWS_SECRET_ACCESS_KEY={secret}\n",
        "basic_auth.ini": f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {uri}\n",
    }


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "secrets"
    if folder.exists():
        sys.exit(f"{folder}: exists already; to start over, delete it and the volumes of the services")
    folder.mkdir(mode=0o700, parents=True)
    for name, text in contents().items():
        with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    print(f"{folder}: {', '.join(sorted(contents()))}")


if __name__ == "__main__":
    main()
