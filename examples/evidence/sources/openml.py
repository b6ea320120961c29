"""Data sets of OpenML by their ids, through `sklearn.datasets.fetch_openml`."""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.datasets import fetch_openml

from sources.rows import MISSING, Rows, Source

KIND = "OpenML"

# The classification sets of TabArena-v0.1 by their OpenML data set ids: the columns `dataset_id` and
# `dataset_name`, where `is_classification` is true, of curated_tabarena_dataset_metadata.csv in
# github.com/autogluon/tabarena. Its 13 regression sets have other ids.
TABARENA = {
    46905: "Amazon_employee_access",
    46906: "anneal",
    46908: "APSFailure",
    46910: "bank-marketing",
    46911: "Bank_Customer_Churn",
    46912: "Bioresponse",
    46913: "blood-transfusion-service-center",
    46915: "churn",
    46916: "coil2000_insurance_policies",
    46918: "credit-g",
    46919: "credit_card_clients_default",
    46920: "customer_satisfaction_in_airline",
    46921: "diabetes",
    46922: "Diabetes130US",
    46924: "E-CommereShippingData",
    46927: "Fitness_Club",
    46929: "GiveMeSomeCredit",
    46930: "hazelnut-spread-contaminant-detection",
    46932: "heloc",
    46933: "hiva_agnostic",
    46935: "HR_Analytics_Job_Change_of_Data_Scientists",
    46937: "in_vehicle_coupon_recommendation",
    46938: "Is-this-a-good-customer",
    46939: "kddcup09_appetency",
    46940: "Marketing_Campaign",
    46941: "maternal_health_risk",
    46980: "MIC",
    46969: "NATICUSdroid",
    46947: "online_shoppers_intention",
    46950: "polish_companies_bankruptcy",
    46952: "qsar-biodeg",
    46955: "SDSS17",
    46956: "seismic-bumps",
    46958: "splice",
    46960: "students_dropout_and_academic_success",
    46962: "taiwanese_bankruptcy_prediction",
    46963: "website_phishing",
    46979: "jm1",
}


def rows(bunch: Any) -> Rows:
    """The rows of a data set without pandas: numbers, and the names of categories."""
    data = bunch.data.toarray() if sparse.issparse(bunch.data) else bunch.data
    columns = [np.asarray(data[:, k], np.float64) for k in range(data.shape[1])]
    for k, feature in enumerate(bunch.feature_names):
        if feature in bunch.categories:
            names = np.array([*bunch.categories[feature], MISSING], dtype=object)
            columns[k] = names[np.nan_to_num(columns[k], nan=-1).astype(int)]
    return Rows(columns, bunch.target)


def fetch(data_id: int, folder: pathlib.Path) -> Any:
    """A data set, from the folder if it was fetched before.

    Raises:
        ValueError: If its target is no class, or a column holds free text, which the parser refuses.
    """
    try:
        # The parser that needs no pandas. Names come as numbers, with a list of the names of each column.
        bunch: Any = fetch_openml(data_id=data_id, data_home=str(folder), as_frame=False, parser="liac-arff")
    except OSError as error:
        raise SystemExit(
            f"data set {data_id} of OpenML is not under {folder / 'openml'}, and could not be fetched: "
            f"{error}. Run this once where there is a network; it is kept in the folder for later."
        ) from error
    if bunch.target is None or bunch.target.ndim != 1 or bunch.target.dtype.kind == "f":
        raise ValueError("its target is not one column of classes")
    if len(set(bunch.target)) < 2:
        raise ValueError("it has one class")
    return bunch


def sources(ids: Sequence[int], folder: pathlib.Path) -> Iterator[Source]:
    """The data sets with these ids. Those that cannot be classified are named and left out."""
    for data_id in ids:
        try:
            bunch = fetch(data_id, folder)
        except ValueError as error:
            print(f"left out: data set {data_id} of OpenML: {error}", file=sys.stderr)
            continue
        name = f"{bunch.details['name'].replace('/', '-')} {data_id}"
        yield Source(KIND, name, name, functools.partial(rows, bunch))
