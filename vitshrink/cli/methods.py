"""``vitshrink methods``: what there is to choose from."""

from rich.table import Table

from vitshrink.allocation import ALLOCATIONS
from vitshrink.cli import console
from vitshrink.methods import available_methods, get_method


@console.reported
def methods_command() -> None:
    """List the methods, what they need, and the allocation and compensation that go with them."""
    table = Table(box=None, pad_edge=False)
    for heading in ("method", "needs", "allocation", "compensation", "what it does"):
        table.add_column(heading, overflow="fold")
    for name in available_methods():
        method = get_method(name)
        table.add_row(name, method.needs.value, method.allocation, method.compensation, method.summary)
    console.output.print(table)
    console.output.print(f"\nallocations: {', '.join(sorted(ALLOCATIONS))}")
