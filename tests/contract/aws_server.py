"""
AWS as moto has it, as a process: `python -m tests.contract.aws_server`; it says its port, and ends with its parent.

moto does not know SAM: it passes over what is SAM's, and so must it over what hangs on that. Nor does it make alarms
by a template, nor then a dashboard that names them.
"""

import logging

from moto.cloudformation import parsing
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tools.processes import end_with_parent

ON_SAM = ("AWS::Lambda::Permission", "AWS::ApiGateway::BasePathMapping")
ON_ALARMS = ("AWS::CloudWatch::Alarm", "AWS::CloudWatch::Dashboard")


def main():
    end_with_parent()
    parsing.NULL_MODELS += ON_SAM + ON_ALARMS
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
