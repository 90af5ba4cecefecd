"""Which keys a config has: the table's, its objective's, its evaluations'."""

import ml_collections

from jepa_jax import config_table, keys


def of_objective(name: str) -> dict[str, keys.Key]:
  """Keys that an objective declares, by their names under `method`.

  Raises:
    ValueError: no such objective.
  """
  key = config_table.KEYS["objective"]
  key.kind.check("objective", name)
  if name == key.default:
    return config_table.IJEPA  # without an import of JAX
  from jepa_jax import objectives

  return objectives.load(name).keys


def of_config(config: ml_collections.ConfigDict) -> dict[str, keys.Key]:
  """Dotted name -> key of all that a config may have.

  Raises:
    ValueError: no such objective.
  """
  table = config_table.KEYS
  found = dict(table)
  for name, key in of_objective(config.objective).items():
    found[f"method.{name}"] = key
  data = {name: key for name, key in table.items() if name.startswith("data.")}
  for evaluation in config.evaluations:
    for name, key in (config_table.EVALUATION | data).items():
      found[f"evaluations.{evaluation}.{name}"] = key
  return found


def of_package() -> list[tuple[str, keys.Key, str]]:
  """(dotted name, key, objective or "") of all, in the order to be shown."""
  from jepa_jax import objectives

  found = [(name, key, "") for name, key in config_table.KEYS.items()]
  for objective in objectives.OBJECTIVES:
    for name, key in of_objective(objective).items():
      found.append((f"method.{name}", key, objective))
  for name, key in config_table.EVALUATION.items():
    found.append((f"evaluations.NAME.{name}", key, ""))
  return found
