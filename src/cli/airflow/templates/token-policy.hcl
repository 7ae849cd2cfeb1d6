# ACL policy for ringfence's token on this host. Make it with
#   consul acl policy create -name {{deployment}}-ringfence -rules @consul/token-policy.hcl
#   consul acl token create -policy-name {{deployment}}-ringfence
# write on a service is the right to speak as it. Add each identity that airflow.toml gives to tasks, and no more.
{{services}}#service "{{identity}}" {
#  policy = "write"
#}
# To find the other side.
service_prefix "" {
  policy = "read"
}
node_prefix "" {
  policy = "read"
}
