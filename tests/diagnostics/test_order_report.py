"""How check_order prints what it found."""

from torch import nn

from torchdrop.diagnostics import check_order


def test_the_report():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
    report = check_order(model)
    assert len(report) == 1
    assert report[0] is report.findings[0]
    assert report[:] == report.findings
    assert repr(report).splitlines() == [
        "order in Sequential: 1 dropout before a BatchNorm",
        "  0 (Dropout, 0.5) stands before 1: in the model's own forward, 1 operation on",
    ]
    assert not check_order(nn.Sequential(nn.BatchNorm1d(3)))
    assert repr(check_order(nn.Sequential(nn.BatchNorm1d(3)))) == (
        "order in Sequential: no dropout before a BatchNorm"
    )
    assert repr(check_order(nn.Linear(2, 2))) == "order in Linear: no BatchNorm"
