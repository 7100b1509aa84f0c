"""x"""

from cdc.inspection import Inspection


def page(found: Inspection) -> str:
    return ""
