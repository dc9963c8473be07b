"""Scanners under one spelling, and their places in a consortium's table."""

from __future__ import annotations

import pytest

from shared_models.scanners import DEFAULT_TABLE, OTHER, ScannerName, ScannerTable, parse_scanner
from simulation.scanners import ALL_SCANNERS


class TestNames:
    @pytest.mark.parametrize(
        ("name", "parsed"),
        [
            ("SIEMENS Aurora 1.5 T", ScannerName("SIEMENS", "aurora", 1.5)),
            ("Siemens  Healthineers  Aurora 1.5T", ScannerName("SIEMENS", "aurora", 1.5)),
            ("GE MEDICAL SYSTEMS SIGNA Vesper 3 T", ScannerName("GE", "signa vesper", 3.0)),
            ("TOSHIBA_MEC Titan", ScannerName("CANON", "titan", None)),
            ("Philips", ScannerName("PHILIPS", None, None)),
            ("Gerda 3 T", ScannerName(OTHER, "gerda", 3.0)),
            ("Nikon NF505", ScannerName(OTHER, "nikon nf505", None)),
        ],
    )
    def test_spellings_of_one_company_are_one(self, name, parsed):
        """
        A maker has several names in headers, and a word that begins like one is not one.
        """
        assert parse_scanner(name) == parsed


class TestTable:
    def test_first_name_that_covers_a_scanner_gives_its_place(self):
        """
        A model goes before its maker; what no name covers shares the last place; nothing said is no place.
        """
        table = ScannerTable(["GE SIGNA Vesper", "GE", "Siemens Healthineers 3 T"])

        assert table.names[-1] == OTHER
        assert [
            table.place(name)
            for name in (
                "GE HEALTHCARE SIGNA Vesper 1.5 T",
                "GE 3 T",
                "SIEMENS Prisma 3 T",
                "SIEMENS 1.5 T",
                "Acme",
                None,
                "",
            )
        ] == [0, 1, 2, 3, 3, -1, -1]

    def test_default_table_needs_no_list(self):
        """
        The large makers at the usual field strengths have places of their own, and all others one together.
        """
        table = ScannerTable()

        assert len(table) == len(DEFAULT_TABLE) + 1
        assert table.place("SIEMENS Prisma 3 T") != table.place("SIEMENS Aera 1.5 T") != table.place("SIEMENS X 7 T")
        assert table.place("UIH uMR 3 T") == len(table) - 1

    def test_emulated_headers_are_told_apart(self):
        """
        The four usual emulated scanners have four places of the default table.
        """
        names = [f"{s.manufacturer} {s.model} {s.field_strength_t:g} T" for s in list(ALL_SCANNERS.values())[:4]]

        assert len({ScannerTable().place(name) for name in names}) == 4
