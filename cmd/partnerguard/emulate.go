package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/partnerguard/partnerguard/internal/emulator"
	"github.com/spf13/cobra"
)

// Where emulate listens: fixed, so that a configuration can name it.
const (
	emulateEntra      = "127.0.0.1:8181"
	emulateEntraTLS   = "127.0.0.1:8143"
	emulatePartner    = "127.0.0.1:8182"
	emulatePartnerTLS = "127.0.0.1:8144"

	emulatePartnerAPI    = "127.0.0.1:8183"
	emulatePartnerAPITLS = "127.0.0.1:8145"
	emulateGraph         = "127.0.0.1:8184"
	emulateGraphTLS      = "127.0.0.1:8146"
)

func newEmulate(e environment) *cobra.Command {
	c := &cobra.Command{
		Use:   "emulate",
		Short: "Run the emulator of Entra and Partner Center alone",
		Long: `Run a stand-in for Microsoft's side on this machine, to try clients and the guard
against before production: Entra with key sets and token endpoints (client
credentials, password, refresh token, with and without MFA), Partner Center with a
dozen resources, MFA refusals in every known shape, throttling and paging, and the
parts of the Partner API and Graph that partners automate.

It prints how to get a token of each kind with curl. Put --print-config into a file
and run partnerguard serve -c FILE beside it to have the guard in between.`,
		Example: `  partnerguard emulate
  partnerguard emulate --print-config > guard.yaml && partnerguard serve -c guard.yaml`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			printConfig, _ := c.Flags().GetBool("print-config")
			exposure, _ := c.Flags().GetFloat64("exposure")
			shapeName, _ := c.Flags().GetString("shape")
			caFile, _ := c.Flags().GetString("ca")
			shape, err := emulator.ParseShape(shapeName)
			if err != nil {
				return usage(err, "see partnerguard emulate --help")
			}
			if !(exposure >= 0 && exposure <= 1) {
				return usage(fmt.Errorf("--exposure %v is not a share", exposure), "write a number from 0 to 1, such as 0.3")
			}
			if printConfig {
				_, err := fmt.Fprint(e.out, emulator.ConfigYAML("http://"+emulateEntra, "http://"+emulatePartner,
					emulator.Upstream{Name: emulator.PartnerAPI, URL: "http://" + emulatePartnerAPI, Hosts: []string{"partner-api.localhost"}, RewriteLinks: true},
					emulator.Upstream{Name: emulator.Graph, URL: "http://" + emulateGraph, Hosts: []string{"graph.localhost"}, RewriteLinks: true}))
				return err
			}
			em, err := emulator.Start(emulator.Config{
				EntraAddress: emulateEntra, EntraTLSAddress: emulateEntraTLS,
				PartnerAddress: emulatePartner, PartnerTLSAddress: emulatePartnerTLS,
				PartnerAPIAddress: emulatePartnerAPI, PartnerAPITLSAddress: emulatePartnerAPITLS, PublicPartnerAPIURL: "http://" + emulatePartnerAPI,
				GraphAddress: emulateGraph, GraphTLSAddress: emulateGraphTLS, PublicGraphURL: "http://" + emulateGraph,
				OwnLinks: true,
				Exposure: exposure, ExposureGrowth: exposure / 10, Shape: shape,
			})
			if err != nil {
				return failed(err, "the emulator uses fixed ports; is another one running?")
			}
			defer em.Close()
			if caFile == "" {
				caFile = filepath.Join(os.TempDir(), "partnerguard-emulator-ca.pem")
			}
			if err := os.WriteFile(caFile, em.CAPEM(), 0o644); err != nil {
				return failed(fmt.Errorf("write the throw-away CA: %w", err), "see --ca")
			}
			fmt.Fprintf(e.out, "# Entra           %s   %s\n# Partner Center  %s   %s\n# Partner API     %s   %s\n# Graph           %s   %s\n# CA of https     %s\n\n",
				em.EntraURL(), em.EntraTLSURL(), em.PartnerURL(), em.PartnerTLSURL(), em.PartnerAPIURL(), em.PartnerAPITLSURL(), em.GraphURL(), em.GraphTLSURL(), caFile)
			if err := em.Recipe(e.out); err != nil {
				return err
			}
			fmt.Fprintln(e.out, "\n# running until interrupted")
			<-c.Context().Done()
			return nil
		},
	}
	c.Flags().Bool("print-config", false, "print the configuration that points partnerguard serve at the emulator, and end")
	c.Flags().Float64("exposure", 0, "share of calls without MFA, 0 to 1, that Partner Center refuses with 900421; it grows")
	c.Flags().String("shape", "mixed", "shape of these refusals")
	c.Flags().String("ca", "", "`FILE` to write the CA of the https listeners to (default: in the temporary directory)")
	return c
}
